"""One pass through an arbitrary network: taps, features, gradients, ReAct, panels of experts."""
