"""How backend 'cuda' cuts a scan into chunks and blocks, what buffers it makes, and the launch."""

from functools import lru_cache

import torch
from torch import Tensor

from ...calls import Direction
from . import structures
from .cut import Cut, Device, Sizes, choose, split_channels
from .library import DTYPES, address, call, constant, library, limits, matrix, sequence, stream

FEW_STATES = 16  # more than these are computed in float32 only


def count_groups(*matrices: Tensor) -> int:
    return max(m.shape[1] if m.ndim == 4 else 1 for m in matrices)


class Inputs:
    """Tensors of one direction in the dtype that the kernels read."""

    def __init__(self, direction: Direction, reverse: bool, dtype: torch.dtype):
        self.given = direction
        self.reverse = reverse
        self.u, self.delta, self.B, self.C = (
            x.to(dtype) for x in (direction.u, direction.delta, direction.B, direction.C)
        )
        self.A, self.D, self.delta_bias = (
            None if x is None else x.float().contiguous()
            for x in (direction.A, direction.D, direction.delta_bias)
        )

    def structure(self, **more) -> structures.Direction:
        return structures.Direction(
            reverse=self.reverse,
            **{name: sequence(getattr(self, name)) for name in ('u', 'delta')},
            **{name: matrix(getattr(self, name)) for name in 'BC'},
            **{name: address(getattr(self, name)) for name in ('A', 'D', 'delta_bias')},
            **more,
        )


def kernel_dtype(z: Tensor | None, directions: list[Direction]) -> torch.dtype:
    """What sequences and matrices are read as: their own dtype where they share one and there are
    kernels for it, else float32."""
    dtypes, matrices = set() if z is None else {z.dtype}, []
    for direction in directions:
        dtypes |= {x.dtype for x in (direction.u, direction.delta, direction.B, direction.C)}
        matrices += [direction.B, direction.C]
    plain = directions[0].A.shape[1] <= FEW_STATES and all(m.ndim > 2 for m in matrices)
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


class Plan:
    """How a scan is cut into blocks; fills what all of its kernels are given."""

    def __init__(self, directions: list[Inputs], z: Tensor | None, softplus: bool, scale: float):
        first = directions[0]
        self.u, self.directions, self.z = first.u, directions, z
        self.device, self.dtype = first.u.device, first.u.dtype
        self.batch, self.channels, self.length = first.u.shape
        self.states = first.A.shape[1]
        self.groups = count_groups(first.B, first.C)
        self.sizes = Sizes(
            *(len(directions), self.batch, self.groups, self.channels // self.groups),
            *(self.length, self.states),
        )
        self.softplus, self.scale = softplus, scale

    def choose(self, backward: bool) -> None:
        """Cut the scan for one of the passes, both of which have the same chunks."""
        self.cut = choose_cut(self.sizes, self.device, backward)
        segments = -(-self.length // (self.cut.chunks * constant('segment')))
        self.chunk_length = segments * constant('segment')
        self.chunks = -(-self.length // self.chunk_length)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def run(
        self,
        function: str,
        directions: list[structures.Direction],
        splits: int = 1,
        **more,
    ) -> None:
        between = {}
        if self.chunks > 1:
            rows = (len(directions), self.batch, self.chunks)
            between['ends'] = self.empty(*rows, self.states, self.channels)
            between['sums'] = self.empty(*rows, self.channels)
        call(
            function,
            self.u,
            structures.Scan(
                dtype=DTYPES[self.dtype],
                device=self.device.index or 0,
                stream=stream(self.u),
                batch=self.batch,
                channels=self.channels,
                length=self.length,
                states=self.states,
                groups=self.groups,
                directions=len(directions),
                softplus=self.softplus,
                chunks=self.chunks,
                chunk_length=self.chunk_length,
                warps=self.cut.warps,
                lanes=self.cut.lanes,
                splits=splits,
                scale=self.scale,
                z=sequence(self.z),
                direction=(structures.Direction * 2)(*directions),
                **{name: x.data_ptr() for name, x in between.items()},
                **{name: sequence(x) for name, x in more.items()},
            ),
        )

    def partial(self, like: Tensor | None) -> Tensor | None:
        """What one direction leaves for the other: the result itself where it is float32."""
        if like is None or len(self.directions) == 1:
            return None
        return like if like.dtype == torch.float32 else torch.empty_like(like, dtype=torch.float32)

    def forward(self, out: Tensor, checkpoints: list, last_state: Tensor | None = None) -> None:
        directions = [
            inputs.structure(checkpoints=address(saved), last_state=address(last_state))
            for inputs, saved in zip(self.directions, checkpoints, strict=True)
        ]
        self.choose(backward=False)
        self.run('mmvim_scan_forward', directions, out=out, partial=self.partial(out))

    def backward(self, grad_out, grad_last_state, checkpoints: list) -> tuple[list, Tensor | None]:
        """The gradients of each direction, None for those that were not given, and that of z."""
        self.choose(backward=True)
        splits = split_channels(self.cut, self.sizes)
        directions, buffers = [], []
        for inputs, saved in zip(self.directions, checkpoints, strict=True):
            rows = {name: getattr(inputs, name) for name in ('A', 'D', 'delta_bias')}
            sums = {
                name: self.empty(self.batch, self.chunks, *reversed(x.shape))
                for name, x in rows.items()
                if x is not None
            }
            for name in 'BC':
                if getattr(inputs, name).ndim == 2:
                    shape = (self.batch, self.chunks, self.states, self.channels)
                else:
                    shape = (self.batch, self.groups, splits, self.length, self.states)
                sums[name] = self.empty(*shape)
            direct = {f'grad_{n}': torch.empty_like(getattr(inputs, n)) for n in ('u', 'delta')}
            directions.append(
                inputs.structure(
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
            directions,
            splits,
            grad_out=grad_out,
            grad_z=grad_z,
            partial=self.partial(grad_z),
        )
        return [
            _add_up(inputs.given, *buffer)
            for inputs, buffer in zip(self.directions, buffers, strict=True)
        ], grad_z


def _add_up(given: Direction, grad_u: Tensor, grad_delta: Tensor, sums: dict) -> Direction:
    """The gradients of a direction; of those that were not given, None."""

    def total(name: str) -> Tensor | None:
        x = getattr(given, name)
        if x is None:
            return None
        if x.ndim > 2:
            grad = sums[name].sum(2).mT  # (B, G, N, L)
            return grad.squeeze(1) if x.ndim == 3 else grad
        grad = sums[name].sum((0, 1))  # (N, D) or (D,)
        return grad.mT.contiguous() if x.ndim == 2 else grad

    return Direction(grad_u, grad_delta, *map(total, Direction._fields[2:]))
