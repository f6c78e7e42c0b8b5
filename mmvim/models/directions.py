"""Directions in which Vision Mamba reads its sequence. No other file tells one from another.

To add one, write an entry of :data:`DIRECTIONS`: the scans of a block's mixer, and, where plain
scans of row-major patches are not enough, the order in which they read or a subclass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .sequence import insert_class_tokens, split_class_tokens

__all__ = ['DIRECTIONS', 'Directions', 'Scan']

Grid = tuple[int, int]


def column_order(positions: Tensor, grid: Grid, place: str | None) -> Tensor:
    """Positions (L,) of a row-major sequence, column by column; class tokens keep their place."""
    patches, tokens = split_class_tokens(positions[None, :, None], place)  # (1, M | T, 1)
    patches = patches.unflatten(1, grid).transpose(1, 2).flatten(1, 2)  # (1, M, 1)
    return insert_class_tokens(patches, tokens, place)[0, :, 0]  # (L,)


class Scan(NamedTuple):
    """One scan of a mixer.

    Args:
        conv1d, x_proj, dt_proj, A_log, D (str): Names of its parameters in official checkpoints.
            Scans that name the same share it.
        reverse (bool): Scan from the last token to the first.
        conv_reverse (bool): The convolution sees the tokens behind instead of those before.
        order (Callable, optional): Positions (L,), the grid (rows, columns) of patches and the
            place of the class tokens to the positions in the order of reading, (L,).
    """

    conv1d: str = 'conv1d'
    x_proj: str = 'x_proj'
    dt_proj: str = 'dt_proj'
    A_log: str = 'A_log'
    D: str = 'D'
    reverse: bool = False
    conv_reverse: bool = False
    order: Callable[[Tensor, Grid, str | None], Tensor] | None = None


FORWARD = Scan()
BACKWARD_STATES = Scan(A_log='A_b_log', reverse=True)
BACKWARD = Scan(
    *('conv1d_b', 'x_proj_b', 'dt_proj_b', 'A_b_log', 'D_b'), reverse=True, conv_reverse=True
)
COLUMNS_BACKWARD = BACKWARD._replace(order=column_order)


class Directions:
    """How blocks read the sequence: here each by itself, with the scans of its mixer.

    Args:
        name (str): The value of ``directions``.
        scans (Scan): Of every mixer.
        reducible (bool): The argument ``reduction`` says how the scans are joined. They are added
            up otherwise.
    """

    #: Blocks that read the sequence together.
    blocks_per_step = 1

    def __init__(self, name: str, *scans: Scan, reducible: bool = False) -> None:
        self.name, self.scans, self.reducible = name, scans, reducible

    @property
    def reads_backward(self) -> bool:
        """The first token sees those behind it."""
        return any(scan.reverse for scan in self.scans)

    def flips(self) -> bool:
        """Whether the sequence is flipped in this step of training."""
        return False

    def scale(self, reduction: str) -> float:
        """Factor of the scans' sum."""
        return 1 / len(self.scans) if self.reducible and reduction == 'mean' else 1.0

    def orders(
        self, length: int, grid: Grid, place: str | None, device: torch.device
    ) -> tuple[Tensor | None, ...]:
        """For each scan the order in which it reads, (L,) int64 or None; () if none has any."""
        if all(scan.order is None for scan in self.scans):
            return ()
        positions = torch.arange(length, device=device)
        return tuple(scan.order and scan.order(positions, grid, place) for scan in self.scans)

    def step(
        self,
        blocks: list[Callable],
        hidden: Tensor,
        residual: Tensor | None,
        orders: tuple[Tensor | None, ...],
    ) -> tuple[Tensor, Tensor]:
        """Run ``blocks_per_step`` blocks on (B, L, C) hidden states and residual stream."""
        return blocks[0](hidden, residual, *orders)


class FlippedSequence(Directions):
    """Training flips the whole sequence at random."""

    def flips(self) -> bool:
        return bool(torch.rand((), device='cpu') < 0.5)


class BlockPairs(Directions):
    """The second block of each pair reads the input of the first one flipped; both are added."""

    blocks_per_step = 2
    reads_backward = True

    def step(self, blocks, hidden, residual, orders):
        forward = blocks[0](hidden, residual, *orders)
        flipped = None if residual is None else residual.flip(1)
        backward = blocks[1](hidden.flip(1), flipped, *orders)
        return tuple(ahead + back.flip(1) for ahead, back in zip(forward, backward, strict=True))


#: Every value of ``directions``.
DIRECTIONS = {
    directions.name: directions
    for directions in (
        Directions('none', FORWARD),
        FlippedSequence('sequence', FORWARD),
        BlockPairs('block', FORWARD),
        Directions('ssm', FORWARD, BACKWARD_STATES),
        Directions('ssm_conv', FORWARD, BACKWARD, reducible=True),
        # Columns from the last patch to the first: with the rows before it, a patch then sees all
        # of the image except what is both below and left of it.
        Directions('cross', FORWARD, COLUMNS_BACKWARD, reducible=True),
    )
}
