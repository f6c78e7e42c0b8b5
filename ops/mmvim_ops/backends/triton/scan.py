"""The scan's operators: cuts a scan into programs and launches ``scan_kernels.py``."""

import torch
from torch import Tensor

from ...naive import compute_dtype
from ..operators import ScanTensors, fake_scan, fake_scan_backward, scan_tensors

CHUNK = 64  # steps between two saved states, a multiple of STRIDE: here every chunk is one segment
STRIDE = 4  # steps whose states backward holds in registers at once
TILE = 512  # states · channels of a program: 16 registers of a warp for each
CARRY_TILE = 128  # the same for `carry`, where a lane needs little
SCRATCH = 1 << 25  # elements of backward's scratch; at least what one batch element needs


def saved_states(length):
    """One at the start of every chunk."""
    return (length + CHUNK - 1) // CHUNK


class Launcher:
    """How a scan is cut into programs, and what all of its kernels are given."""

    def __init__(self, u: Tensor, A: Tensor, B: Tensor, C: Tensor, softplus: bool, reverse: bool):
        import triton.language as tl
        from triton import cdiv, next_power_of_2

        from . import scan_kernels

        self.kernels = scan_kernels
        self.device, self.dtype = u.device, compute_dtype(u.dtype)
        self.batch, self.channels, self.length = u.shape
        self.states = A.shape[1]
        self.chunks = cdiv(self.length, CHUNK)
        self.groups = max(m.shape[1] if m.ndim == 4 else 1 for m in (B, C))
        per_group = self.channels // self.groups
        block_n = next_power_of_2(self.states)
        block_d = min(max(1, TILE // block_n), next_power_of_2(per_group))
        self.blocks = self.groups * cdiv(per_group, block_d)
        self.for_all = dict(
            channels=self.channels,
            STATES=self.states,
            DTYPE=tl.float64 if self.dtype == torch.float64 else tl.float32,
            num_warps=1,
        )
        self.for_tiles = dict(
            self.for_all,
            length=self.length,
            per_group=per_group,
            blocks=self.blocks,
            SOFTPLUS=softplus,
            REVERSE=reverse,
            CHUNK=CHUNK,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
        )

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def per_chunk(self, *shape: int) -> Tensor:
        """A buffer with a row for every chunk."""
        return self.empty(self.batch, self.chunks, *shape)

    def run(self, kernel: str, *arguments, **more) -> None:
        """One program per batch element, chunk and block of channels."""
        grid = (self.batch * self.chunks * self.blocks,)
        getattr(self.kernels, kernel)[grid](*arguments, **self.for_tiles, **more)

    def begins(self, x, gate, delta, A, M, delta_bias, first=None, backward=False) -> Tensor:
        """What every chunk begins with, where the first one of the pass begins with ``first``."""
        begins = self.per_chunk(self.states, self.channels)
        if self.chunks == 1:
            return begins.zero_() if first is None else begins.copy_(first.mT.unsqueeze(1))
        sums = self.per_chunk(self.channels)
        given = [_strided(t) for t in (x, gate, delta, A, M, delta_bias)]
        self.run('chunk_ends', *given, begins, sums, BACKWARD=backward)
        self.kernels.carry[(self.batch * -(-self.states * self.channels // CARRY_TILE),)](
            begins,
            sums,
            _strided(A),
            _strided(first),
            self.chunks,
            BACKWARD=backward,
            BLOCK=CARRY_TILE,
            **self.for_all,
        )
        return begins

    def addends(self, x: Tensor | None) -> Tensor | None:
        """A buffer for what adds up to the gradient of A, B, C, D or delta_bias."""
        if x is None:
            return None
        if x.ndim > 2:
            return self.empty(self.batch, self.blocks, self.length, self.states)
        return self.per_chunk(*reversed(x.shape))  # channels last

    def add_up(self, x: Tensor | None, addends: Tensor | None) -> Tensor | None:
        """The gradient of ``x``."""
        if x is None:
            return None
        if x.ndim > 2:
            return addends.unflatten(1, (self.groups, -1)).sum(2).mT  # (B, G, N, L)
        total = addends.sum((0, 1))  # (N, D) or (D,)
        return total.mT if x.ndim == 2 else total


def _matrix(m: Tensor) -> Tensor:
    """Groups for B and C without any; channels fastest for A and the constant ones, so that no
    kernel has to turn its tile around."""
    if m.ndim == 2:
        return m.mT.contiguous().mT
    return m.unsqueeze(1) if m.ndim == 3 else m


def _strided(x: Tensor | None) -> tuple | None:
    """How kernels take a tensor."""
    return None if x is None else (x, *x.stride())


# The operators.


def scan(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Operator ``triton_scan``."""
    *tensors, softplus, reverse, save = arguments
    u, delta, A, B, C, D, z, delta_bias = tensors
    out, last_state, checkpoints = fake_scan(saved_states, *arguments)
    if u.numel() == 0:
        return out, last_state.zero_(), checkpoints
    A, B, C = map(_matrix, (A, B, C))
    launcher = Launcher(u, A, B, C, softplus, reverse)
    with torch.cuda.device_of(u):
        starts = launcher.begins(u, None, delta, A, B, delta_bias)
        tensors = (u, delta, A, B, C, D, z, delta_bias)
        launcher.run('forward', *map(_strided, tensors), starts, _strided(out), last_state)
    return out, last_state, starts if save else checkpoints


def scan_backward(grad_out, grad_last_state, *arguments) -> tuple[Tensor, ...]:
    """Operator ``triton_scan_backward``."""
    *tensors, checkpoints, softplus, reverse = arguments
    given = ScanTensors(*tensors)
    grads = fake_scan_backward(grad_out, grad_last_state, *arguments)
    if given.u.numel() == 0:
        return tuple(grad.zero_() for grad in grads)
    per_element = given.A.numel() * checkpoints.shape[1] * (CHUNK // STRIDE)
    size = max(1, SCRATCH // per_element)
    parts = []
    for first in range(0, given.u.shape[0], size):

        def cut(x, part=slice(first, first + size)):
            """Along the batch dimension, where there is one."""
            return x if x is None or x.ndim < 3 else x[part]

        of_part = ScanTensors(*map(cut, given))
        into = ScanTensors(
            *(None if x is None else cut(grad) for x, grad in zip(given, grads, strict=True))
        )
        arriving = map(cut, (grad_out, grad_last_state, checkpoints))
        with torch.cuda.device_of(given.u):
            parts.append(_backward_of_part(*arriving, of_part, into, softplus, reverse))
    for x, grad, part in zip(given, grads, zip(*parts, strict=True), strict=True):
        if part[0] is not None:
            grad.copy_(sum(part) if x.ndim < 3 else torch.cat(part).view_as(grad))
    return grads


def _backward_of_part(
    grad_out: Tensor,
    grad_last_state: Tensor,
    checkpoints: Tensor,
    given: ScanTensors,
    into: ScanTensors,
    softplus: bool,
    reverse: bool,
) -> ScanTensors:
    """Write the gradients of u, delta and z to ``into``; return the others, None in their place."""
    u, delta, A, B, C, D, z, delta_bias = given
    A, B, C = map(_matrix, (A, B, C))
    launcher = Launcher(u, A, B, C, softplus, reverse)
    arriving = launcher.begins(grad_out, z, delta, A, C, delta_bias, grad_last_state, backward=True)
    scratch = launcher.per_chunk(CHUNK // STRIDE, launcher.states, launcher.channels)
    summed = given.direction()._replace(u=None, delta=None, A=A, B=B, C=C)
    addends = summed._replace(
        **{name: launcher.addends(x) for name, x in summed._asdict().items() if x is not None}
    )
    launcher.run(
        'backward',
        *map(_strided, (grad_out, u, delta, A, B, C, D, z, delta_bias)),
        checkpoints,
        arriving,
        scratch,
        *map(_strided, (into.u, into.delta, into.z)),
        *addends[2:],
        STRIDE=STRIDE,
    )
    totals = map(launcher.add_up, summed, addends)
    return scan_tensors(summed._make(totals), None)


IMPLEMENTATIONS = {'scan': scan, 'scan_backward': scan_backward}
