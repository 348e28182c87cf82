"""FuseNorm and single experts: fit, score, search."""
