"""How backend 'cuda' cuts a scan into blocks and chunks, what buffers it makes, and the launch."""

import math

import torch
from torch import Tensor

from .library import (
    DTYPES,
    Scan,
    Side,
    address,
    call,
    library,
    limits,
    matrix,
    sequence,
    stream,
)

SEGMENT = 64  # kSegment of csrc/cuda/args.h: steps between two checkpoints
FEW_STATES = 16  # more than these are computed in float32 only

# How a scan is cut, from counting and not yet from measuring on a GPU. A multiprocessor's
# four schedulers are taken to be busy with WARPS warps each; chunks cost a second pass.
WARPS = 2
SECOND_PASS = 1.8
SHORTEST_CHUNK = 2 * SEGMENT


def count_groups(*matrices: Tensor) -> int:
    return max(m.shape[1] if m.ndim == 4 else 1 for m in matrices)


class Arguments:
    """Tensors of one direction in the dtype that the kernels read, and their gradients."""

    def __init__(self, u, delta, A, B, C, D, delta_bias, reverse: bool, dtype: torch.dtype):
        self.given = (u, delta, A, B, C, D, delta_bias)
        self.reverse = reverse
        self.u, self.delta, self.B, self.C = (x.to(dtype) for x in (u, delta, B, C))
        self.A, self.D, self.delta_bias = (
            None if x is None else x.float().contiguous() for x in (A, D, delta_bias)
        )

    def side(self, **more) -> Side:
        return Side(
            reverse=self.reverse,
            **{name: sequence(getattr(self, name)) for name in ('u', 'delta')},
            **{name: matrix(getattr(self, name)) for name in 'BC'},
            **{name: address(getattr(self, name)) for name in ('A', 'D', 'delta_bias')},
            **more,
        )


def kernel_dtype(z: Tensor | None, *directions) -> torch.dtype:
    """What sequences and matrices are read as: their own dtype where they share one and there are
    kernels for it, else float32."""
    dtypes, matrices = set() if z is None else {z.dtype}, []
    for u, delta, _, B, C, *_ in directions:
        dtypes |= {x.dtype for x in (u, delta, B, C)}
        matrices += [B, C]
    plain = directions[0][2].shape[1] <= FEW_STATES and all(m.ndim > 2 for m in matrices)
    return dtypes.pop() if plain and len(dtypes) == 1 else torch.float32


def count_chunks(warps: int, schedulers: int, length: int) -> int:
    """Into how many chunks that run side by side the length is cut.

    One chunk needs one pass. More of them need a second one, and pay where there are too few warps
    to keep the GPU's schedulers busy.
    """
    busy = warps / (WARPS * schedulers)
    most = max(1, length // SHORTEST_CHUNK)
    chunks = min(most, math.ceil(1 / busy))
    return chunks if SECOND_PASS / min(1, chunks * busy) < 1 / min(1, busy) else 1


class Plan:
    """How a scan is cut into blocks; fills what all of its kernels are given."""

    def __init__(self, sides: list[Arguments], z: Tensor | None, softplus: bool, scale: float):
        first = sides[0]
        self.u, self.sides, self.z = first.u, sides, z
        self.device, self.dtype = first.u.device, first.u.dtype
        self.batch, self.channels, self.length = first.u.shape
        self.states = first.A.shape[1]
        self.groups = count_groups(first.B, first.C)
        self.library = library(self.device.type)
        processors, self.shared_bytes = limits(self.device)
        self.per_warp = self.library.mmvim_channels_per_warp(self.states)
        per_group = self.channels // self.groups
        warps = len(sides) * self.batch * self.groups * -(-per_group // self.per_warp)
        chunks = count_chunks(warps, 4 * processors, self.length)
        self.chunk_length = -(-self.length // (chunks * SEGMENT)) * SEGMENT
        self.chunks = -(-self.length // self.chunk_length)
        self.segments = -(-self.length // SEGMENT)
        self.processors, self.per_group = processors, per_group
        self.softplus, self.scale = softplus, scale

    def blocks(self, warps: int) -> int:
        """Blocks that share the channels of a group."""
        return -(-self.per_group // (warps * self.per_warp))

    def warps(self, backward: bool) -> int:
        """Of a block, per direction: many share what is read of B and C, few spread evenly."""
        for warps in (2,) if len(self.sides) == 2 else (4, 2):
            bytes_needed = self.library.mmvim_shared_bytes(
                self.states, warps, len(self.sides), backward
            )
            blocks = self.batch * self.chunks * self.groups * self.blocks(warps)
            fits = bytes_needed <= self.shared_bytes and self.blocks(warps // 2) > 1
            if fits and blocks >= 2 * self.processors:
                return warps
        return 1

    def splits(self, warps: int) -> int:
        """Rows that sums over channels get: for B and C together at most twice the size of u."""
        return min(self.blocks(warps), max(1, self.per_group // self.states))

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def run(self, entry: str, sides: list[Side], backward: bool, splits: int = 1, **more) -> None:
        between = {}
        if self.chunks > 1:
            rows = (len(sides), self.batch, self.chunks)
            between['ends'] = self.empty(*rows, self.states, self.channels)
            between['sums'] = self.empty(*rows, self.channels)
        call(
            entry,
            self.u,
            Scan(
                dtype=DTYPES[self.dtype],
                device=self.device.index or 0,
                stream=stream(self.u),
                batch=self.batch,
                channels=self.channels,
                length=self.length,
                states=self.states,
                groups=self.groups,
                directions=len(sides),
                softplus=self.softplus,
                chunks=self.chunks,
                chunk_length=self.chunk_length,
                warps=self.warps(backward),
                splits=splits,
                scale=self.scale,
                z=sequence(self.z),
                side=(Side * 2)(*sides),
                **{name: x.data_ptr() for name, x in between.items()},
                **{name: sequence(x) for name, x in more.items()},
            ),
        )

    def partial(self, like: Tensor | None) -> Tensor | None:
        """What one direction leaves for the other: the result itself where it is float32."""
        if like is None or len(self.sides) == 1:
            return None
        return like if like.dtype == torch.float32 else torch.empty_like(like, dtype=torch.float32)

    def forward(self, out: Tensor, checkpoints: list, last_state: Tensor | None = None) -> None:
        sides = [
            side.side(checkpoints=address(saved), last_state=address(last_state))
            for side, saved in zip(self.sides, checkpoints, strict=True)
        ]
        self.run('mmvim_scan_forward', sides, False, out=out, partial=self.partial(out))

    def backward(self, grad_out, grad_last_state, checkpoints: list) -> tuple[list, Tensor | None]:
        """Gradients of u, delta, A, B, C, D, delta_bias for each direction, and that of z."""
        warps = self.warps(True)
        splits = self.splits(warps)
        sides, buffers = [], []
        for side, saved in zip(self.sides, checkpoints, strict=True):
            rows = {'A': side.A, 'D': side.D, 'delta_bias': side.delta_bias}
            sums = {
                name: self.empty(self.batch, self.chunks, *reversed(x.shape))
                for name, x in rows.items()
                if x is not None
            }
            for name in 'BC':
                if getattr(side, name).ndim == 2:
                    shape = (self.batch, self.chunks, self.states, self.channels)
                else:
                    shape = (self.batch, self.groups, splits, self.length, self.states)
                sums[name] = self.empty(*shape)
            direct = {f'grad_{n}': torch.empty_like(getattr(side, n)) for n in ('u', 'delta')}
            sides.append(
                side.side(
                    checkpoints=address(saved),
                    grad_last_state=address(grad_last_state),
                    **{f'grad_{name}': x.data_ptr() for name, x in sums.items()},
                    **{name: sequence(x) for name, x in direct.items()},
                )
            )
            buffers.append((*direct.values(), sums))
        grad_z = None if self.z is None else torch.empty_like(self.z)
        self.run(
            'mmvim_scan_backward',
            sides,
            True,
            splits,
            grad_out=grad_out,
            grad_z=grad_z,
            partial=self.partial(grad_z),
        )
        return [
            _add_up(side, *buffer) for side, buffer in zip(self.sides, buffers, strict=True)
        ], grad_z


def _add_up(side: Arguments, grad_u: Tensor, grad_delta: Tensor, sums: dict) -> list:
    """Gradients of a direction's arguments, None for those that were not given."""
    grads = [grad_u, grad_delta]
    for name, x in zip(('A', 'B', 'C', 'D', 'delta_bias'), side.given[2:], strict=True):
        if x is None:
            grads.append(None)
        elif x.ndim > 2:
            grad = sums[name].sum(2).mT  # (B, G, N, L)
            grads.append(grad.squeeze(1) if x.ndim == 3 else grad)
        else:
            total = sums[name].sum((0, 1))  # (N, D) or (D,)
            grads.append(total.mT.contiguous() if x.ndim == 2 else total)
    return grads
