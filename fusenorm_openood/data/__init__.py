"""Images: OpenOOD's lists, preprocessing and benchmarks, and a benchmark without downloads."""
