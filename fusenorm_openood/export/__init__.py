"""Export a fitted detector: one program from pixels to verdicts, for ONNX and for `torch.export`."""
