"""Backend 'torch': plain PyTorch, on every device."""
