"""Image to patch tokens."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ['PatchEmbed']


class PatchEmbed(nn.Module):
    """Non-overlapping (or, with ``stride < patch_size``, overlapping) patches to tokens."""

    def __init__(self, in_channels: int, embed_dims: int, patch_size: int, stride: int) -> None:
        super().__init__()
        self.patch_size, self.stride = patch_size, stride
        self.proj = nn.Conv2d(in_channels, embed_dims, patch_size, stride)
        fan_in = in_channels * patch_size**2
        nn.init.trunc_normal_(self.proj.weight, std=fan_in**-0.5)  # LeCun normal
        nn.init.zeros_(self.proj.bias)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image, the last ones padded where they stick out."""
        rows, columns = (
            -(-max(side - self.patch_size, 0) // self.stride) + 1 for side in (height, width)
        )
        return rows, columns

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(B, in_channels, H, W) to tokens (B, Hp * Wp, C) and the grid (Hp, Wp)."""
        height, width = x.shape[-2:]
        rows, columns = self.grid(height, width)
        bottom = (rows - 1) * self.stride + self.patch_size - height
        right = (columns - 1) * self.stride + self.patch_size - width
        if bottom > 0 or right > 0:
            x = F.pad(x, (0, right, 0, bottom))
        return self.proj(x).flatten(2).transpose(1, 2), (rows, columns)  # (B, Hp * Wp, C)
