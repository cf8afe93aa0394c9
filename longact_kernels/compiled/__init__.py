"""The kernels compiled ahead of time, on a machine without a GPU: what they cost, and what they are predicted to do."""
