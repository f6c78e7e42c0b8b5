"""Two-dimensional rotary position embedding for token sequences."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ['RotaryEmbedding2D']


class RotaryEmbedding2D(nn.Module):
    """Rotate pairs of channels by angles that grow with the row and the column of a token.

    The first half of the channels encodes the row, the second half the column, as in
    `EVA-02 <https://arxiv.org/abs/2303.11331>`_. Positions are scaled so that any grid spans
    ``grid`` units, which keeps a pretrained model's angles when the input grows. Tokens without a
    place in the image (class tokens) are left as they are.

    Args:
        embed_dims (int): Channels, a multiple of 4.
        grid (float): Side of the grid, in tokens, that the angles belong to.
        base (float): Wavelength base of the angles.
    """

    frequencies: Tensor

    def __init__(self, embed_dims: int, grid: float, base: float = 10000.0) -> None:
        super().__init__()
        if embed_dims % 4:
            raise ValueError(f'rope needs embed_dims divisible by 4, got {embed_dims}')
        self.grid = grid
        half = embed_dims // 2
        frequencies = base ** (-torch.arange(0, half, 2, dtype=torch.float32) / half)
        self.register_buffer('frequencies', frequencies, persistent=False)  # (C/4,)

    def rotation(self, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the angles on an (Hp, Wp) grid, each (Hp * Wp, C)."""
        angles = []
        for axis, size in enumerate(shape):
            position = torch.arange(size, device=self.frequencies.device) * (self.grid / size)
            angle = torch.outer(position, self.frequencies).repeat_interleave(2, dim=-1)
            angle = angle.unsqueeze(1 - axis)  # (Hp, 1, C/2) for rows, (1, Wp, C/2) for columns
            angles.append(angle.expand(*shape, -1))
        angles = torch.cat(angles, dim=-1).flatten(0, 1)  # (Hp * Wp, C)
        return angles.cos(), angles.sin()

    @staticmethod
    def rotate(tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate (B, L, C) tokens by the angles given as (L, C) cosines and sines."""
        even, odd = tokens.unflatten(-1, (-1, 2)).unbind(-1)  # 2 × (B, L, C/2)
        turned = torch.stack((-odd, even), dim=-1).flatten(-2)  # (B, L, C)
        return tokens * cos.to(tokens.dtype) + turned * sin.to(tokens.dtype)
