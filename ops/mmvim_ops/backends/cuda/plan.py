"""How backend 'cuda' cuts a scan into chunks and blocks, and where in memory its sums are."""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...calls import Direction
from .library import constant, library, limits

FEW_STATES = 16  # more than these are computed in float32 only
ALIGNMENT = 32  # floats: a buffer begins where a line of the GPU's cache does

# How a scan is cut, from counting and not yet from measuring on a GPU. A multiprocessor's
# four schedulers are taken to be busy with WARPS warps each; chunks cost a second pass.
WARPS = 2
SECOND_PASS = 1.8
SHORTEST_CHUNK = 2  # in segments


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


def count_chunks(warps: int, schedulers: int, length: int) -> int:
    """Into how many chunks that run side by side the length is cut.

    One chunk needs one pass. More of them need a second one, and pay where there are too few warps
    to keep the GPU's schedulers busy.
    """
    busy = warps / (WARPS * schedulers)
    most = max(1, length // (SHORTEST_CHUNK * constant('segment')))
    chunks = min(most, math.ceil(1 / busy))
    return chunks if SECOND_PASS / min(1, chunks * busy) < 1 / min(1, busy) else 1


class Sizes(NamedTuple):
    """All that a plan depends on."""

    device: torch.device
    batch: int
    channels: int
    length: int
    states: int
    groups: int
    directions: int
    matrices: tuple[str, ...]  # B and C of all directions: 'constant', 'float32' or 'half'
    partial: bool  # whether one direction leaves the other its part in a buffer of its own


class Offsets(NamedTuple):
    """Where the buffers of a pass begin in one piece of memory, in bytes; its size in floats."""

    ends: int
    sums: int
    partial: int
    # Backward: those of the sums for B, C, A, D and delta_bias; None where there is one block that
    # writes to the gradient itself.
    of_directions: tuple[tuple[int | None, ...], ...]
    floats: int


class Plan(Sizes):
    """How a scan is cut into blocks. Made once for the same sizes, see :func:`find_plan`."""

    def __init__(self, *_):
        self.library = library(self.device.type)
        self.processors, self.shared_bytes = limits(self.device)
        self.per_warp = self.library.mmvim_channels_per_warp(self.states)
        self.per_group = self.channels // self.groups
        warps = self.directions * self.batch * self.groups * -(-self.per_group // self.per_warp)
        chunks = count_chunks(warps, 4 * self.processors, self.length)
        segment = constant('segment')
        self.chunk_length = -(-self.length // (chunks * segment)) * segment
        self.chunks = -(-self.length // self.chunk_length)
        self.forward_warps, self.backward_warps = self.warps(False), self.warps(True)
        self.backward_splits = self.splits(self.backward_warps)
        self.forward, self.backward = self.lay_out(False), self.lay_out(True)

    def blocks(self, warps: int) -> int:
        """Blocks that share the channels of a group."""
        return -(-self.per_group // (warps * self.per_warp))

    def warps(self, backward: bool) -> int:
        """Of a block, per direction. More warps reuse what is read of B and C; fewer balance the
        multiprocessors."""
        for warps in (2,) if self.directions == 2 else (4, 2):
            bytes_needed = self.library.mmvim_shared_bytes(
                self.states, warps, self.directions, backward
            )
            blocks = self.batch * self.chunks * self.groups * self.blocks(warps)
            fits = bytes_needed <= self.shared_bytes and self.blocks(warps // 2) > 1
            if fits and blocks >= 2 * self.processors:
                return warps
        return 1

    def splits(self, warps: int) -> int:
        """Rows that sums over channels get: for B and C together at most twice the size of u."""
        return min(self.blocks(warps), max(1, self.per_group // self.states))

    def lay_out(self, backward: bool) -> Offsets:
        """The buffers of csrc/cuda/args.h that no caller sees, one after the other."""
        floats = 0

        def room(*shape: int) -> int:
            nonlocal floats
            begin = floats
            floats += -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT
            return 4 * begin

        per_chunk = self.batch * self.chunks
        between = self.directions * per_chunk if self.chunks > 1 else 0
        ends, sums = room(between, self.states, self.channels), room(between, self.channels)
        partial = room(self.batch, self.channels, self.length) if self.partial else 0
        of_directions = []

        def matrix(kind: str) -> int | None:
            if kind == 'constant':
                return room(per_chunk, self.states, self.channels)
            if kind == 'float32' and self.backward_splits == 1:
                return None
            return room(self.batch, self.groups, self.backward_splits, self.length, self.states)

        for i in range(self.directions if backward else 0):
            B, C = map(matrix, self.matrices[2 * i : 2 * i + 2])
            A = room(per_chunk, self.states, self.channels)
            vectors = room(per_chunk, self.channels), room(per_chunk, self.channels)
            of_directions.append((B, C, A, *vectors))
        return Offsets(ends, sums, partial, tuple(of_directions), floats)


def _kind(m: Tensor) -> str:
    return 'constant' if m.ndim == 2 else 'float32' if m.dtype is torch.float32 else 'half'


@lru_cache(maxsize=1024)
def _make(sizes: tuple, *_) -> Plan:
    return Plan(*sizes)


def find_plan(directions: list[Direction], dtype: torch.dtype, gate: bool, backward: bool) -> Plan:
    """The plan for a scan whose tensors are read as ``dtype``."""
    u, _, A, B, C, _, _ = directions[0]
    batch, channels, length = u.shape
    sizes = (
        *(u.device, batch, channels, length, A.shape[1], count_groups(B, C), len(directions)),
        tuple(_kind(m) for d in directions for m in (d.B, d.C)),
        len(directions) == 2 and dtype != torch.float32 and (gate or not backward),
    )
    # Whoever puts another rule in place of one of these, as tests do, gets another plan.
    return _make(sizes, count_chunks, Plan.warps, Plan.splits)
