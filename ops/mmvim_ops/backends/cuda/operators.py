"""Backend 'cuda': the operators over the kernels of ``csrc/cuda``, registered with torch.

Buffers come from torch's allocator and nothing waits for the GPU, so that calls can be captured in
CUDA graphs. The kernels compute in float32; double precision is left to other backends.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operators import (
    fake_bidirectional_scan_backward,
    fake_conv1d,
    fake_conv1d_backward,
    fake_scan_backward,
    like,
    needs_gradient,
    register_gradients,
)
from ..torch import conv1d as torch_conv
from ..torch import scan as torch_scan
from .library import DTYPES, Convolution, address, call, missing, sequence, stream
from .plan import SEGMENT, Arguments, Plan, count_groups, kernel_dtype

__all__ = ['DTYPES', 'bidirectional_scan', 'conv1d', 'missing', 'scan']

MOST_STATES = 256  # kMostStates
MOST_STATES_OF_TWO = 64  # of two directions at once: what any GPU has shared memory for
CONV_STEPS = 64  # kConvSteps
MOST_TAPS = 32  # kMostTaps


# What the registry calls; see mmvim_ops.backends.Backend.


def scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse):
    if A.shape[1] > MOST_STATES:
        return torch_scan.scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
    save = needs_gradient(u, delta, A, B, C, D, z, delta_bias)
    out, last_state, _ = torch.ops.mmvim_ops.cuda_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, save
    )
    return out, last_state


def bidirectional_scan(forward, backward, z, delta_softplus, scale):
    """None where the two directions do not fit into one launch."""
    states = max(forward.A.shape[1], backward.A.shape[1])
    if states > MOST_STATES_OF_TWO:
        return None
    groups = math.lcm(count_groups(forward.B, forward.C), count_groups(backward.B, backward.C))
    if forward.u.shape[1] % groups:
        return None
    forward, backward = (_widen(direction, states, groups) for direction in (forward, backward))
    save = needs_gradient(*forward, *backward, z)
    return torch.ops.mmvim_ops.cuda_bidirectional_scan(
        *forward, *backward, z, delta_softplus, scale, save
    )[0]


def conv1d(x, weight, bias, silu, reverse):
    if weight.shape[1] > MOST_TAPS:
        return torch_conv.conv1d(x, weight, bias, silu, reverse)
    return torch.ops.mmvim_ops.cuda_conv1d(x, weight, bias, silu, reverse)


def _widen(direction, states: int, groups: int):
    """The same scan with as many states and groups as the other direction has."""
    u, delta, A, B, C, D, delta_bias = direction
    missing = states - A.shape[1]

    def matrix(m: Tensor) -> Tensor:
        if m.ndim == 2:
            return F.pad(m, (0, missing)) if missing else m
        m = F.pad(m, (0, 0, 0, missing)) if missing else m
        if groups == 1 or (m.ndim == 4 and m.shape[1] == groups):
            return m
        return (m.unsqueeze(1) if m.ndim == 3 else m).repeat_interleave(
            groups // (m.shape[1] if m.ndim == 4 else 1), dim=1
        )

    return u, delta, F.pad(A, (0, missing)), matrix(B), matrix(C), D, delta_bias


# The operators.


def _fake_checkpoints(u: Tensor, A: Tensor, save: bool) -> Tensor:
    batch, channels, length = u.shape
    segments = (length + SEGMENT - 1) // SEGMENT
    shape = (batch, segments, A.shape[1], channels) if save else (0,)
    return u.new_empty(shape, dtype=torch.float32)


def _cast(grad: Tensor | None, x: Tensor | None, u: Tensor) -> Tensor:
    """In the dtype of the argument; an empty one where it was not given."""
    return like(None, u) if x is None else grad.to(x.dtype)


@torch.library.custom_op(
    'mmvim_ops::cuda_scan',
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
    direction = (u, delta, A, B, C, D, delta_bias)
    dtype = kernel_dtype(z, direction)
    plan = Plan(
        [Arguments(*direction, reverse, dtype)],
        None if z is None else z.to(dtype),
        delta_softplus,
        1.0,
    )
    result = out if dtype == u.dtype else torch.empty_like(out, dtype=dtype)
    plan.forward(result, [checkpoints if save else None], last_state)
    return result.to(u.dtype), last_state, checkpoints


@_scan.register_fake
def _fake_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, save):
    last_state = u.new_empty(u.shape[0], u.shape[1], A.shape[1], dtype=torch.float32)
    return torch.empty_like(u), last_state, _fake_checkpoints(u, A, save)


@torch.library.custom_op(
    'mmvim_ops::cuda_scan_backward',
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
    if u.numel() == 0:
        grads = fake_scan_backward(None, None, *tensors, None, None, None)
        return tuple(grad.zero_() for grad in grads)
    direction = (u, delta, A, B, C, D, delta_bias)
    dtype = kernel_dtype(z, direction)
    plan = Plan(
        [Arguments(*direction, reverse, dtype)],
        None if z is None else z.to(dtype),
        delta_softplus,
        1.0,
    )
    (grads,), grad_z = plan.backward(
        grad_out.to(dtype), grad_last_state.float().contiguous(), [checkpoints]
    )
    grads.insert(6, grad_z)
    return tuple(_cast(grad, x, u) for grad, x in zip(grads, tensors, strict=True))


_DIRECTIONS = (
    'Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, '
    'Tensor u_b, Tensor delta_b, Tensor A_b, Tensor B_b, Tensor C_b, Tensor? D_b, '
    'Tensor? delta_bias_b, Tensor? z, '
)


@torch.library.custom_op(
    'mmvim_ops::cuda_bidirectional_scan',
    mutates_args=(),
    schema=f'({_DIRECTIONS}bool delta_softplus, float scale, bool save) '
    '-> (Tensor, Tensor, Tensor)',
)
def _bidirectional_scan(*arguments):
    """Output and, where ``save``, what backward needs besides the arguments."""
    u, save = arguments[0], arguments[-1]
    out, *checkpoints = _fake_bidirectional_scan(*arguments)
    if u.numel() == 0:
        return out, *checkpoints
    plan = _two_directions(*arguments[:-1])
    result = out if plan.dtype == u.dtype else torch.empty_like(out, dtype=plan.dtype)
    plan.forward(result, checkpoints if save else [None, None])
    return result.to(u.dtype), *checkpoints


def _two_directions(*arguments) -> Plan:
    *tensors, z, delta_softplus, scale = arguments
    directions = (tensors[:7], tensors[7:])
    dtype = kernel_dtype(z, *directions)
    sides = [Arguments(*directions[i], bool(i), dtype) for i in range(2)]
    return Plan(sides, None if z is None else z.to(dtype), delta_softplus, scale)


@_bidirectional_scan.register_fake
def _fake_bidirectional_scan(*arguments):
    u, A, A_b, save = arguments[0], arguments[2], arguments[9], arguments[-1]
    return torch.empty_like(u), _fake_checkpoints(u, A, save), _fake_checkpoints(u, A_b, save)


@torch.library.custom_op(
    'mmvim_ops::cuda_bidirectional_scan_backward',
    mutates_args=(),
    schema=f'(Tensor grad_out, {_DIRECTIONS}Tensor checkpoints, Tensor checkpoints_b, '
    'bool delta_softplus, float scale) -> Tensor[]',
)
def _bidirectional_scan_backward(grad_out, *arguments):
    """Gradients of both directions' tensors and of z; empty ones of what was not given."""
    *tensors, checkpoints, checkpoints_b, delta_softplus, scale = arguments
    u = tensors[0]
    if u.numel() == 0:
        grads = fake_bidirectional_scan_backward(grad_out, *arguments)
        return [grad.zero_() for grad in grads]
    plan = _two_directions(*tensors, delta_softplus, scale)
    grads, grad_z = plan.backward(grad_out.to(plan.dtype), None, [checkpoints, checkpoints_b])
    grads = [*grads[0], *grads[1], grad_z]
    return [_cast(grad, x, u) for grad, x in zip(grads, tensors, strict=True)]


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, silu, reverse) -> dict:
    return dict(
        dtype=DTYPES[x.dtype],
        device=x.device.index or 0,
        stream=stream(x),
        batch=x.shape[0],
        channels=x.shape[1],
        length=x.shape[2],
        taps=weight.shape[1],
        silu=silu,
        reverse=reverse,
        x=sequence(x),
        weight=weight.data_ptr(),
        bias=address(bias),
    )


def _packed(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


@torch.library.custom_op(
    'mmvim_ops::cuda_conv1d',
    mutates_args=(),
    schema='(Tensor x, Tensor weight, Tensor? bias, bool silu, bool reverse) -> Tensor',
)
def _conv1d(x, weight, bias, silu, reverse):
    out, weight, bias = torch.empty_like(x), _packed(weight), _packed(bias)
    if x.numel() > 0:
        arguments = _convolution(x, weight, bias, silu, reverse)
        call('mmvim_conv_forward', x, Convolution(**arguments, out=sequence(out)))
    return out


@torch.library.custom_op(
    'mmvim_ops::cuda_conv1d_backward',
    mutates_args=(),
    schema='(Tensor grad_out, Tensor x, Tensor weight, Tensor? bias, bool silu, bool reverse) '
    '-> (Tensor, Tensor, Tensor)',
)
def _conv1d_backward(grad_out, x, weight, bias, silu, reverse):
    """Gradients of x, weight, bias; an empty one of what was not given."""
    grad_x, packed, packed_bias = torch.empty_like(x), _packed(weight), _packed(bias)
    tiles = -(-x.shape[2] // CONV_STEPS)
    shape = (x.shape[0], tiles, x.shape[1], weight.shape[1] + 1)
    sums = torch.empty(shape, dtype=torch.float32, device=x.device)
    if x.numel() > 0:
        grad_out = grad_out.to(x.dtype)
        arguments = _convolution(x, packed, packed_bias, silu, reverse)
        arguments |= dict(grad_out=sequence(grad_out), grad_x=sequence(grad_x))
        call('mmvim_conv_backward', x, Convolution(**arguments, grad_parameters=sums.data_ptr()))
    sums = sums.sum((0, 1))  # (D, taps + 1)
    grad_weight = sums[:, :-1].to(weight.dtype, copy=True, memory_format=torch.contiguous_format)
    return grad_x, grad_weight, _cast(sums[:, -1].contiguous(), bias, x)


_conv1d.register_fake(fake_conv1d)
for backward, fake in (
    (_scan_backward, fake_scan_backward),
    (_bidirectional_scan_backward, fake_bidirectional_scan_backward),
    (_conv1d_backward, fake_conv1d_backward),
):
    backward.register_fake(fake)
register_gradients('cuda')
