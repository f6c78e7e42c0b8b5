"""Where in memory a scan's sums are, and what its kernels are told of its sizes and its cut."""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...calls import Direction
from .cut import Cut, Device, Sizes, choose, split_channels
from .library import library, limits
from .structures import SEGMENT

FEW_STATES = 16  # more than these are computed in float32 only
ALIGNMENT = 32  # floats: a buffer begins where a line of the GPU's cache does


def count_groups(B: Tensor, C: Tensor) -> int:
    """Both have as many, where they are not constant."""
    return B.shape[1] if B.ndim == 4 else C.shape[1] if C.ndim == 4 else 1


def kernel_dtype(z: Tensor | None, directions: list[Direction]) -> torch.dtype:
    """What sequences and matrices are read as: their own dtype where they share one and there are
    kernels for it, else float32."""
    dtypes = set() if z is None else {z.dtype}
    plain = directions[0].A.shape[1] <= FEW_STATES
    for u, delta, _, B, C, _, _ in directions:
        dtypes |= {u.dtype, delta.dtype, B.dtype, C.dtype}
        plain = plain and B.ndim > 2 and C.ndim > 2
    return dtypes.pop() if plain and len(dtypes) == 1 else torch.float32


@lru_cache(maxsize=4096)
def choose_cut(sizes: Sizes, device: torch.device, backward: bool) -> Cut:
    """The cheapest one, by :func:`cut.choose`."""
    compiled = library(device.type)

    def shared_bytes(lanes: int, warps: int, backward: bool) -> int:
        return compiled.mmvim_shared_bytes(sizes.states, lanes, warps, sizes.directions, backward)

    def most_threads(lanes: int, backward: bool) -> int:
        return compiled.mmvim_most_threads(sizes.states, lanes, backward)

    return choose(sizes, Device(*limits(device)), backward, shared_bytes, most_threads)


class Offsets(NamedTuple):
    """Where the buffers of a pass begin in one piece of memory, in bytes; its size in floats."""

    ends: int
    sums: int
    partial: int
    # Backward: those of the sums for B, C, A, D and delta_bias; None where there is one block that
    # writes to the gradient itself.
    of_directions: tuple[tuple[int | None, ...], ...]
    floats: int


class Plan:
    """One pass over a scan of these sizes. The same plan serves all of them, see :func:`find_plan`.

    Args:
        sizes (Sizes): Of the scan.
        cut (Cut): How it is cut.
        splits (int): Rows that backward's sums over channels get; 0 in the forward pass.
        matrices (tuple[str, ...]): B and C of all directions: 'constant', 'float32' or 'half'.
        partial (bool): Whether one direction leaves the other its part in a buffer of its own.
    """

    def __init__(
        self, sizes: Sizes, cut: Cut, splits: int, matrices: tuple[str, ...], partial: bool
    ):
        self.sizes, self.cut, self.partial = sizes, cut, partial
        self.chunk_length = -(-sizes.length // (cut.chunks * SEGMENT)) * SEGMENT
        self.chunks = -(-sizes.length // self.chunk_length)
        self.splits = max(1, splits)
        self.layout = self.lay_out(matrices if splits else ())

    def lay_out(self, matrices: tuple[str, ...]) -> Offsets:
        """The buffers of csrc/cuda/args.h that no caller sees, one after the other."""
        directions, batch, groups, per_group, length, states = self.sizes
        channels, floats = groups * per_group, 0

        def room(*shape: int) -> int:
            nonlocal floats
            begin = floats
            floats += -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT
            return 4 * begin

        per_chunk = batch * self.chunks
        between = directions * per_chunk if self.chunks > 1 else 0
        ends, sums = room(between, states, channels), room(between, channels)
        partial = room(batch, channels, length) if self.partial else 0
        of_directions = []

        def matrix(kind: str) -> int | None:
            if kind == 'constant':
                return room(per_chunk, states, channels)
            if kind == 'float32' and self.splits == 1:
                return None
            return room(batch, groups, self.splits, length, states)

        for B, C in zip(matrices[::2], matrices[1::2], strict=True):
            of_matrices = matrix(B), matrix(C)
            A = room(per_chunk, states, channels)
            vectors = room(per_chunk, channels), room(per_chunk, channels)
            of_directions.append((*of_matrices, A, *vectors))
        return Offsets(ends, sums, partial, tuple(of_directions), floats)


def _kind(m: Tensor) -> str:
    return 'constant' if m.ndim == 2 else 'float32' if m.dtype is torch.float32 else 'half'


_make = lru_cache(maxsize=4096)(Plan)


def find_plan(directions: list[Direction], dtype: torch.dtype, gate: bool, backward: bool) -> Plan:
    """The plan for a scan whose tensors are read as ``dtype``."""
    u, _, A, B, C, _, _ = directions[0]
    batch, channels, length = u.shape
    groups = count_groups(B, C)
    sizes = Sizes(len(directions), batch, groups, channels // groups, length, A.shape[1])
    cut = choose_cut(sizes, u.device, backward)
    return _make(
        *(sizes, cut, split_channels(cut, sizes) if backward else 0),
        tuple(_kind(m) for d in directions for m in (d.B, d.C)),
        len(directions) == 2 and dtype != torch.float32 and (gate or not backward),
    )
