"""What the documentation takes from code and measurements: `python -m docs.gen` rewrites it."""
