"""Where class tokens stand in a patch sequence, and in the position embedding that matches it.

The embedding stores rows for class tokens at the same places as the sequence, so both are put
together and taken apart with the same two functions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .sizes import all_same

__all__ = ['NUM_CLASS_TOKENS', 'insert_class_tokens', 'resize_pos_embed', 'split_class_tokens']

#: Number of class tokens for each value of ``cls_token``.
NUM_CLASS_TOKENS = {None: 0, 'middle': 1, 'head': 1, 'double': 2}


def insert_class_tokens(patches: Tensor, tokens: Tensor, place: str | None) -> Tensor:
    """Put (B, T, C) class tokens into (B, M, C) patches: (B, M + T, C).

    ``'middle'`` puts one before patch M // 2, ``'head'`` one before all, ``'double'`` one at
    either end.
    """
    if place is None:
        return patches
    before = {'middle': patches.shape[1] // 2, 'head': 0, 'double': 0}[place]
    parts = [patches[:, :before], tokens[:, :1], patches[:, before:], tokens[:, 1:]]
    return torch.cat(parts, dim=1)  # (B, M + T, C)


def split_class_tokens(sequence: Tensor, place: str | None) -> tuple[Tensor, Tensor]:
    """Undo :func:`insert_class_tokens`: patches (B, M, C) and class tokens (B, T, C)."""
    if place is None:
        return sequence, sequence[:, :0]
    num_patches = sequence.shape[1] - NUM_CLASS_TOKENS[place]
    before = {'middle': num_patches // 2, 'head': 0, 'double': 0}[place]
    ahead, first, behind, last = sequence.split(
        (before, 1, num_patches - before, NUM_CLASS_TOKENS[place] - 1), dim=1
    )
    patches = torch.cat([ahead, behind], dim=1) if place == 'middle' else behind  # (B, M, C)
    return patches, torch.cat([first, last], dim=1)  # (B, T, C)


def resize_pos_embed(
    pos_embed: Tensor, source: tuple[int, int], target: tuple[int, int], place: str | None
) -> Tensor:
    """Resize a position embedding to another grid, bicubic, leaving class-token rows as they are.

    Args:
        pos_embed (Tensor): (1, L, C) with rows for the class tokens at ``place``.
        source (tuple[int, int]): Grid (rows, columns) that it is stored for.
        target (tuple[int, int]): Grid wanted.
        place (str, optional): Where the class tokens stand, as ``cls_token`` of the backbone.
    """
    if all_same(source, target):
        return pos_embed
    patches, tokens = split_class_tokens(pos_embed, place)
    image = patches.transpose(1, 2).unflatten(2, source)  # (1, C, Hp, Wp)
    image = F.interpolate(image.float(), size=target, mode='bicubic', align_corners=False)
    patches = image.flatten(2).transpose(1, 2).to(pos_embed.dtype)  # (1, Hp' * Wp', C)
    return insert_class_tokens(patches, tokens, place)
