"""`make gpu`: proves and measures the package on the GPU of a bare machine, in under eight minutes (docs/gpu.md)."""
