"""Train classifiers with cross-entropy and with T2FNorm."""
