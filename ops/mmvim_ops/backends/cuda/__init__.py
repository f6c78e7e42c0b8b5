"""Backend 'cuda': compiled kernels for NVIDIA GPUs, ``csrc/cuda``."""
