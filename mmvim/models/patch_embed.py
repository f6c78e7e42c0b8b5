"""Image to patch tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .sizes import all_same, at_least

__all__ = ['PatchEmbed']


class PatchConv2d(nn.Conv2d):
    """A convolution in float32 for half precisions on the CPU.

    torch has a fast one of half precision there for few processors. On others (and on all in
    float16) its own took longer than all blocks behind it.
    """

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        if dtype == torch.float32 and torch.is_autocast_enabled('cpu'):
            dtype = torch.get_autocast_dtype('cpu')
        if x.device.type != 'cpu' or dtype not in (torch.float16, torch.bfloat16):
            return super().forward(x)
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast('cpu', enabled=False):
            return self._conv_forward(x.float(), self.weight.float(), bias).to(dtype)


class PatchEmbed(nn.Module):
    """Non-overlapping (or, with ``stride < patch_size``, overlapping) patches to tokens.

    Args:
        in_channels (int): Channels of the image.
        embed_dims (int): Channels C of the tokens.
        patch_size (tuple[int, int]): Height and width of a patch in pixels.
        stride (tuple[int, int]): Vertical and horizontal step between patches in pixels.

    Attributes:
        remainder (str): What happens to sides that are no whole number of patches. ``'pad'`` adds
            zeros at the right and bottom: patch i begins at pixel i * stride. ``'resize'`` fits the
            picture to the grid: patch i is centred at (i + ½) / n of the side, where
            ``F.interpolate(..., align_corners=False)`` puts cell i of n.
    """

    def __init__(
        self,
        in_channels: int,
        embed_dims: int,
        patch_size: tuple[int, int],
        stride: tuple[int, int],
    ) -> None:
        super().__init__()
        self.patch_size, self.stride, self.remainder = patch_size, stride, 'pad'
        self.proj = PatchConv2d(in_channels, embed_dims, patch_size, stride)
        fan_in = in_channels * patch_size[0] * patch_size[1]
        nn.init.trunc_normal_(self.proj.weight, std=fan_in**-0.5)  # LeCun normal
        nn.init.zeros_(self.proj.bias)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches that it takes to cover an image."""
        rows, columns = (
            self._cells(at_least(side - patch, 0), step)
            for side, patch, step in zip((height, width), self.patch_size, self.stride, strict=True)
        )
        return rows, columns

    @staticmethod
    def _cells(room: int, step: int) -> int:
        """One patch and as many steps as cover ``room``.

        Never a quotient of negative numbers, which ONNX rounds towards zero.
        """
        if all_same((room % step,), (0,)):  # simpler where a compiler knows it
            return room // step + 1
        return (room + step - 1) // step + 1

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(B, in_channels, H, W) to tokens (B, Hp * Wp, C) and the grid (Hp, Wp)."""
        grid = self.grid(*x.shape[-2:])
        x = self._resize(x, grid) if self.remainder == 'resize' else self._pad(x, grid)
        # Sums keep the strides of their terms: without the copy every norm would make one.
        return self.proj(x).flatten(2).transpose(1, 2).contiguous(), grid  # (B, Hp * Wp, C)

    def _pad(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Zeros at the right and bottom up to the end of the last patch."""
        bottom, right = (
            (count - 1) * step + patch - side
            for count, step, patch, side in zip(
                grid, self.stride, self.patch_size, x.shape[-2:], strict=True
            )
        )
        return x if all_same((bottom, right), (0, 0)) else F.pad(x, (0, right, 0, bottom))

    def _resize(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """The picture on ``count * stride`` pixels a side, its border repeated for overlap.

        Overlapping patches reach beyond their cells by half the overlap on either side.
        """
        (rows, columns), (down, across) = grid, self.stride
        size = rows * down, columns * across
        if not all_same(x.shape[-2:], size):
            x = F.interpolate(x, size, mode='bilinear', align_corners=False)
        high, wide = self.patch_size[0] - down, self.patch_size[1] - across
        if high or wide:
            border = (wide // 2, wide - wide // 2, high // 2, high - high // 2)
            x = F.pad(x, border, mode='replicate')
        return x
