"""One file a benchmark: what is measured, at which sizes."""
