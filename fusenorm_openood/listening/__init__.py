"""One pass over somebody else's network: taps, features, gradients, ReAct, panels of experts."""
