"""Images: OpenOOD's lists and preprocessing, its benchmarks, and one that needs no download."""
