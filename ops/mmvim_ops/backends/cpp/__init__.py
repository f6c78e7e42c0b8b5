"""Backend 'cpp': compiled kernels for the CPU, ``csrc/cpu``."""
