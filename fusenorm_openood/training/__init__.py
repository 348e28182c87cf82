"""Training classifiers by cross-entropy and by T2FNorm."""
