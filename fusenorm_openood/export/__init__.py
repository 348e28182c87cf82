"""Export a fitted detector and its network as one program from pixels to verdicts."""
