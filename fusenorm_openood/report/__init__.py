"""Reports: one self-contained HTML page about an evaluation, a comparison or judged files."""
