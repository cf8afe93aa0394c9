"""Fast CPU implementations, one file an op."""
