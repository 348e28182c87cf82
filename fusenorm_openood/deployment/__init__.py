"""Judge image files, in any number of processes, and write their rows."""
