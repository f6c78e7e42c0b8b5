"""Backend 'triton': kernels for NVIDIA GPUs that Triton compiles when they first run."""
