"""Device code only: `@triton.jit` kernels and their launch configurations."""
