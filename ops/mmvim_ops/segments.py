"""A long sequence, scanned block by block in inference: bounded memory, the same numbers."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import choose_backend
from .checks import check_scan, check_shape, check_tensor
from .interface import Direction
from .naive import compute_dtype, per_channel


def scan_block_(
    out: Tensor,
    state: Tensor,
    direction: Direction,
    z: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    reverse: bool = False,
    accumulate: bool = False,
    scale: float = 1.0,
    backend: str | None = None,
) -> None:
    """Go on with a scan over one block of a sequence, writing into memory that is there already.

    With y of :func:`mmvim_ops.selective_scan` over the block, without gate, that starts from
    ``state`` in place of zeros,

        out ← (y + out) · silu(z) · scale    or, without ``accumulate``,
        out ← y · silu(z) · scale

    and ``state`` becomes the one after the block's last step (its first one with ``reverse``). The
    blocks of a sequence in their order, from a state of zeros, give what the whole sequence gives;
    for ``reverse`` that order is from the last block to the first. For inference only.

    Args:
        out (Tensor): (batch, channels, length), changed in place; dtype of ``u``, any strides.
        state (Tensor): (batch, channels, states), changed in place; contiguous, float32 (float64
            for float64 arguments).
        direction (Direction): ``u``, ``delta``, A, ``B``, ``C``, ``D`` and ``delta_bias`` of the
            block.
        z (Tensor | None): Gate, (batch, channels, length).
        delta_softplus (bool): Whether ``delta`` goes through a softplus.
        reverse (bool): Run from the last time step to the first.
        accumulate (bool): Add to what is in ``out``.
        scale (float): Factor of the result.
        backend (str | None): As in :func:`mmvim_ops.selective_scan`. Only 'cpp' has a kernel for
            it; the others are put together from their scan and (batch, channels, states, length)
            tensors of the block.

    Raises:
        TypeError, ValueError: As :func:`mmvim_ops.selective_scan`; also where ``out`` or ``state``
            do not fit or a gradient is asked for.
    """
    direction = Direction(*direction)
    u, delta, A, B, C, D, delta_bias = direction
    check_scan(u, delta, A, B, C, D, z, delta_bias)
    _check_memory(out, state, direction)
    given = [x for x in (out, state, z, *direction) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        raise ValueError(
            'scan_block_ is for inference, but an argument requires a gradient: '
            'use selective_scan, or torch.inference_mode()'
        )
    chosen = choose_backend(backend, u.device.type, u.dtype)
    run = chosen.scan_block or _from_scan(chosen.scan)
    run(
        *(out, state, direction, z, bool(delta_softplus)),
        *(bool(reverse), bool(accumulate), float(scale)),
    )


def _check_memory(out: Tensor, state: Tensor, direction: Direction) -> None:
    u, A = direction.u, direction.A
    check_tensor('out', out, u)
    check_shape('out', out, tuple(u.shape), '(batch, channels, length)')
    check_tensor('state', state, u)
    check_shape('state', state, (*u.shape[:2], A.shape[1]), '(batch, channels, states)')
    for name, x, dtype in (('out', out, u.dtype), ('state', state, compute_dtype(u.dtype))):
        if x.dtype != dtype:
            raise TypeError(f'{name} must be {dtype} for u of {u.dtype}, got {x.dtype}')
    if not state.is_contiguous():
        raise ValueError(f'state must be contiguous, got strides {state.stride()}')


def _from_scan(scan):
    """The same from a scan that starts at zero: the recurrence is linear in its start."""

    def run(out, state, direction, z, delta_softplus, reverse, accumulate, scale):
        u, delta, A, B, C, D, delta_bias = direction
        if u.numel() == 0:
            return
        dtype = state.dtype
        y, last = scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus, reverse)
        delta = delta.to(dtype)
        if delta_bias is not None:
            delta = delta + delta_bias.to(dtype)[:, None]
        if delta_softplus:
            delta = F.softplus(delta)
        order = (lambda x: x.flip(-1)) if reverse else (lambda x: x)
        elapsed = order(order(delta).cumsum(-1))  # (B, D, L)
        carried = (elapsed[:, :, None] * A.to(dtype)[:, :, None]).exp() * state[..., None]
        y = y.to(dtype) + (carried * per_channel(C.to(dtype), u)).sum(2)  # (B, D, L)
        state.copy_(last + carried[..., 0 if reverse else -1])
        if accumulate:
            y = y + out.to(dtype)
        if z is not None:
            y = y * F.silu(z.to(dtype))
        out.copy_(y * scale)

    return run
