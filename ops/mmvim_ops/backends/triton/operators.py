"""Backend 'triton': launches the kernels of :mod:`.kernels`, registers the operators.

The kernels are imported when they first run: where there is no GPU, Triton costs nothing.
"""

import os
from importlib import metadata

import torch
from torch import Tensor

from ...naive import compute_dtype
from ..operators import (
    fake_scan_backward,
    needs_gradient,
    only_given,
    save_scan_arguments,
)
from ..torch.scan import refuse_second_derivative

CHUNK = 64  # steps between two checkpoints, a multiple of STRIDE
STRIDE = 4  # steps whose states backward holds in registers at once
TILE = 512  # states · channels of a program: 16 registers of a warp for each
CARRY_TILE = 128  # the same for `carry`, where a lane needs little
SCRATCH = 1 << 25  # elements of backward's scratch; at least what one batch element needs
OLDEST = '3.3'  # the first Triton whose kernels take tuples

# Triton reads this once, too. Its interpreter runs the kernels on the CPU, for tests.
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'


def _problem_with_package() -> str | None:
    try:
        version = metadata.version('triton')
    except metadata.PackageNotFoundError:
        return 'Triton is not installed; run: pip install triton'
    if [int(part) for part in version.split('.')[:2]] < [int(part) for part in OLDEST.split('.')]:
        return f'Triton {version} is older than {OLDEST}; run: pip install --upgrade triton'
    return None


PROBLEM = _problem_with_package()


def missing() -> str | None:
    """Why the backend cannot run on this machine; None where it can."""
    if PROBLEM is None and not INTERPRETED and not torch.cuda.is_available():
        return 'there is no CUDA device (TRITON_INTERPRET=1 runs it on the CPU, for tests)'
    return PROBLEM


def scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse):
    """What the registry calls; see :class:`mmvim_ops.backends.Backend`."""
    save = needs_gradient(u, delta, A, B, C, D, z, delta_bias)
    out, last_state, _ = torch.ops.mmvim_ops.triton_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, save
    )
    return out, last_state


class Launcher:
    """How a scan is cut into programs, and what all of its kernels are given."""

    def __init__(self, u: Tensor, A: Tensor, B: Tensor, C: Tensor, softplus: bool, reverse: bool):
        import triton.language as tl
        from triton import cdiv, next_power_of_2

        from . import kernels

        self.kernels = kernels
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


@torch.library.custom_op(
    'mmvim_ops::triton_scan',
    mutates_args=(),
    schema='(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, '
    'Tensor? delta_bias, bool delta_softplus, bool reverse, bool save) -> (Tensor, Tensor, Tensor)',
)
def _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, save):
    """Output, last state and, where ``save``, what backward needs besides the arguments."""
    out, last_state, checkpoints = _fake_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, save
    )
    if u.numel() == 0:
        return out, last_state.zero_(), checkpoints
    A, B, C = map(_matrix, (A, B, C))
    launcher = Launcher(u, A, B, C, delta_softplus, reverse)
    with torch.cuda.device_of(u):
        starts = launcher.begins(u, None, delta, A, B, delta_bias)
        tensors = (u, delta, A, B, C, D, z, delta_bias)
        launcher.run('forward', *map(_strided, tensors), starts, _strided(out), last_state)
    return out, last_state, starts if save else checkpoints


@_scan.register_fake
def _fake_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, save):
    batch, channels, length = u.shape
    states, dtype = A.shape[1], compute_dtype(u.dtype)
    chunks = (length + CHUNK - 1) // CHUNK
    return (
        torch.empty_like(u),
        u.new_empty(batch, channels, states, dtype=dtype),
        u.new_empty((batch, chunks, states, channels) if save else (0,), dtype=dtype),
    )


@torch.library.custom_op(
    'mmvim_ops::triton_scan_backward',
    mutates_args=(),
    schema='(Tensor grad_out, Tensor grad_last_state, Tensor u, Tensor delta, Tensor A, Tensor B, '
    'Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, Tensor checkpoints, bool delta_softplus, '
    'bool reverse) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)',
)
def _scan_backward(
    grad_out,
    grad_last_state,
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    checkpoints,
    delta_softplus,
    reverse,
):
    """Gradients of u, delta, A, B, C, D, z, delta_bias; empty ones of what was not given."""
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    grads = fake_scan_backward(
        grad_out, grad_last_state, *tensors, checkpoints, delta_softplus, reverse
    )
    if u.numel() == 0:
        return tuple(grad.zero_() for grad in grads)
    of_one = A.numel() * checkpoints.shape[1] * (CHUNK // STRIDE)
    size = max(1, SCRATCH // of_one)
    parts = []
    for first in range(0, u.shape[0], size):

        def cut(x, part=slice(first, first + size)):
            """Along the batch dimension, where there is one."""
            return x if x is None or x.ndim < 3 else x[part]

        with torch.cuda.device_of(u):
            parts.append(
                _backward_of_part(
                    *map(cut, (grad_out, grad_last_state, checkpoints)),
                    [cut(x) for x in tensors],
                    [
                        None if x is None else cut(grad)
                        for x, grad in zip(tensors, grads, strict=True)
                    ],
                    delta_softplus,
                    reverse,
                )
            )
    for x, grad, part in zip(tensors, grads, zip(*parts, strict=True), strict=True):
        if part[0] is not None:
            grad.copy_(sum(part) if x.ndim < 3 else torch.cat(part).view_as(grad))
    return grads


def _backward_of_part(
    grad_out, grad_last_state, checkpoints, tensors, grads, delta_softplus, reverse
):
    """Fill the gradients of u, delta and z; return the others, None in place of those."""
    u, delta, A, B, C, D, z, delta_bias = tensors
    A, B, C = map(_matrix, (A, B, C))
    launcher = Launcher(u, A, B, C, delta_softplus, reverse)
    arriving = launcher.begins(grad_out, z, delta, A, C, delta_bias, grad_last_state, backward=True)
    scratch = launcher.per_chunk(CHUNK // STRIDE, launcher.states, launcher.channels)
    summed = (A, B, C, D, delta_bias)
    addends = [launcher.addends(x) for x in summed]
    launcher.run(
        'backward',
        *map(_strided, (grad_out, u, delta, A, B, C, D, z, delta_bias)),
        checkpoints,
        arriving,
        scratch,
        *(_strided(grads[i]) for i in (0, 1, 6)),
        *addends,
        STRIDE=STRIDE,
    )
    *of_matrices, of_D, of_bias = map(launcher.add_up, summed, addends)
    return None, None, *of_matrices, of_D, None, of_bias


def _backward(ctx, grad_out, grad_last_state, _):
    saved = ctx.saved_tensors  # once: recomputation hands them out a single time
    grads = torch.ops.mmvim_ops.triton_scan_backward(
        grad_out, grad_last_state, *saved, ctx.delta_softplus, ctx.reverse
    )
    return *only_given(saved[:8], grads), None, None, None


_scan_backward.register_fake(fake_scan_backward)
_scan.register_autograd(_backward, setup_context=save_scan_arguments)
_scan_backward.register_autograd(refuse_second_derivative)
