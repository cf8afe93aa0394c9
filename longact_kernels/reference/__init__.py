"""Every op in plain PyTorch: the definition that kernels and tests are compared with."""
