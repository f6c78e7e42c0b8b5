"""Self-attention over a grid of patches: all of it, or in windows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import Linear

__all__ = ['Attention', 'explicit_attention', 'join_windows', 'split_windows']


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √d + attn_mask) v, storing the (L, L) weights of every head.

    The specification of :func:`torch.nn.functional.scaled_dot_product_attention`, with its
    arguments, and the memory baseline of the Vim paper.

    Args:
        q, k, v (Tensor): (B, heads, L, d).
        attn_mask (Tensor, optional): Added to the logits, broadcastable to (B, heads, L, L).
    """
    logits = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)  # (B, heads, L, L)
    if attn_mask is not None:
        logits = logits + attn_mask
    return logits.softmax(dim=-1) @ v  # (B, heads, L, d)


class Attention(nn.Module):
    """Multi-head self-attention, optionally with decomposed relative positions.

    Args:
        embed_dims (int): Channels C of the tokens.
        num_heads (int): Heads; each has C // num_heads channels.
        qkv_bias (bool): Whether queries, keys and values have a bias.
        attention (str): ``'fused'``: torch's scaled_dot_product_attention, which picks the best
            kernel; ``'explicit'``: :func:`explicit_attention`.
        rel_pos_size (tuple[int, int], optional): Add a learned bias for each vertical and each
            horizontal distance on a grid of this size (`ViTDet
            <https://arxiv.org/abs/2203.16527>`_, `MViTv2 <https://arxiv.org/abs/2112.01526>`_). It
            starts at zero and is resized linearly for other grids. No class token then.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        qkv_bias: bool = True,
        attention: str = 'fused',
        rel_pos_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attend = explicit_attention
        if attention == 'fused':
            self.attend = F.scaled_dot_product_attention
        self.qkv = Linear(embed_dims, 3 * embed_dims, bias=qkv_bias)
        self.proj = Linear(embed_dims, embed_dims)
        self.rel_pos_h = self.rel_pos_w = None
        if rel_pos_size is not None:
            head_dims = embed_dims // num_heads
            self.rel_pos_h, self.rel_pos_w = (
                nn.Parameter(torch.zeros(2 * side - 1, head_dims)) for side in rel_pos_size
            )

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that stand for places."""
        return {'rel_pos_h', 'rel_pos_w'}

    def forward(self, tokens: Tensor, grid: tuple[int, int], bias: Tensor | None = None) -> Tensor:
        """Mix (B, L, C) tokens; returns the same shape.

        Args:
            tokens (Tensor): (B, L, C), a row-major grid if there are relative positions.
            grid (tuple[int, int]): Its rows and columns.
            bias (Tensor, optional): Added to the logits, broadcastable to (B, heads, L, L).
        """
        qkv = self.qkv(tokens).unflatten(2, (3, self.num_heads, -1))  # (B, L, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 × (B, heads, L, d)
        if self.rel_pos_h is not None:
            positions = self._position_bias(q, grid)
            bias = positions if bias is None else positions + bias
        if bias is not None:
            bias = bias.to(q.dtype)  # autocast leaves it as it is
        out = self.attend(q, k, v, attn_mask=bias)  # (B, heads, L, d)
        return self.proj(out.transpose(1, 2).flatten(2))  # (B, L, C)

    def _position_bias(self, q: Tensor, grid: tuple[int, int]) -> Tensor:
        """Each query's preference for vertical plus horizontal distances: (B, heads, L, L)."""
        rows, columns = grid
        q = q.unflatten(2, grid)  # (B, heads, Hp, Wp, d)
        vertical = torch.einsum('bnhwd,hkd->bnhwk', q, distances(self.rel_pos_h, rows).to(q.dtype))
        horizontal = torch.einsum(
            'bnhwd,wkd->bnhwk', q, distances(self.rel_pos_w, columns).to(q.dtype)
        )
        bias = vertical[..., :, None] + horizontal[..., None, :]  # (B, heads, Hp, Wp, Hp, Wp)
        return bias.flatten(4).flatten(2, 3)  # (B, heads, L, L)


def distances(table: Tensor, side: int) -> Tensor:
    """Rows of a (2 S - 1, d) table by the distance of positions: (side, side, d).

    Row ``S - 1`` is distance zero; with ``side`` other than S, the table is resized first.
    """
    if len(table) != 2 * side - 1:
        table = F.interpolate(table.T[None], size=2 * side - 1, mode='linear')[0].T
    position = torch.arange(side, device=table.device)
    return table[position[:, None] - position[None, :] + side - 1]


def split_windows(
    tokens: Tensor, grid: tuple[int, int], window: int
) -> tuple[Tensor, Tensor | None]:
    """Cut a (B, Hp * Wp, C) grid into windows: (B * n, window², C).

    Windows at the right and bottom are filled up with zeros where the grid ends. The second
    value, (B * n, 1, 1, window²), is to be added to the attention's logits so that nobody attends
    to the filling; it is None if there is none.
    """
    batch, rows, columns = len(tokens), *grid
    bottom, right = -rows % window, -columns % window

    def cut(image: Tensor) -> Tensor:
        image = F.pad(image, (0, 0, 0, right, 0, bottom))
        image = image.unflatten(2, (-1, window)).unflatten(1, (-1, window))  # (B, ny, w, nx, w, C)
        return image.transpose(2, 3).flatten(3, 4).flatten(0, 2)  # (B * ny * nx, w², C)

    windows = cut(tokens.unflatten(1, grid))
    if not bottom and not right:
        return windows, None
    filling = cut(tokens.new_ones(1, rows, columns, 1)) == 0  # (n, w², 1)
    mask = tokens.new_zeros(filling.shape).masked_fill(filling, float('-inf'))
    return windows, mask.transpose(1, 2)[:, None].repeat(batch, 1, 1, 1)


def join_windows(windows: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """Undo :func:`split_windows`: (B, Hp * Wp, C)."""
    rows, columns = grid
    ny, nx = -(-rows // window), -(-columns // window)
    image = windows.unflatten(1, (window, window)).unflatten(0, (-1, ny, nx))
    image = image.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (B, ny * w, nx * w, C)
    return image[:, :rows, :columns].flatten(1, 2)  # (B, Hp * Wp, C)
