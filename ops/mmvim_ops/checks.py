"""Argument checks that run before any kernel: each message names the argument, what was given and
what is needed."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .calls import Direction
from .naive import compute_dtype

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_tensor(name: str, x, like: Tensor | None = None, like_name: str = 'u') -> None:
    """Raise unless ``x`` is a real floating tensor that can be computed with ``like``."""
    if not isinstance(x, Tensor):
        raise TypeError(f'{name} must be a tensor, got {type(x).__name__}')
    if x.dtype not in FLOATS:
        if x.is_complex():
            raise TypeError(
                f'{name} must be real, got {x.dtype}: complex state matrices are not supported'
            )
        raise TypeError(f'{name} must be float64, float32, float16 or bfloat16, got {x.dtype}')
    if like is None:
        return
    if x.device != like.device:
        raise ValueError(
            f'{name} must be on the device of {like_name}, {like.device}, got {x.device}'
        )
    if (x.dtype == torch.float64) != (like.dtype == torch.float64):
        raise TypeError(
            f'{name} is {x.dtype} and {like_name} is {like.dtype}: float64 must be '
            'used for all arguments or for none'
        )


def flag(name: str, value) -> bool:
    """``value`` as a bool; raises where it is none (0 and 1 count as one)."""
    if not isinstance(value, int):
        raise TypeError(f'{name} must be True or False, got {type(value).__name__}')
    return bool(value)


def check_shape(name: str, x: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """Raise unless ``x`` has this shape."""
    if tuple(x.shape) != shape:
        raise ValueError(f'{name} must have shape {meaning} = {shape}, got {tuple(x.shape)}')


def check_rank(name: str, x: Tensor, rank: int, meaning: str) -> None:
    """Raise unless ``x`` has this many dimensions."""
    if x.ndim != rank:
        raise ValueError(
            f'{name} must have {rank} dimensions {meaning}, got {x.ndim}: shape {tuple(x.shape)}'
        )


def check_input_matrix(
    name: str, x: Tensor, batch: int, channels: int, states: int, length: int
) -> int | None:
    """Check B or C and return its number of groups, None where it is constant over time."""
    if x.ndim == 2:
        check_shape(name, x, (channels, states), '(channels, states)')
        return None
    if x.ndim == 3:
        check_shape(name, x, (batch, states, length), '(batch, states, length)')
        return 1
    if x.ndim == 4:
        groups = x.shape[1]
        if groups == 0 or channels % groups:
            raise ValueError(
                f'{name} has {groups} groups, which does not divide the {channels} channels of u'
            )
        check_shape(name, x, (batch, groups, states, length), '(batch, groups, states, length)')
        return groups
    raise ValueError(
        f'{name} must have 2 dimensions (channels, states), 3 (batch, states, length) '
        f'or 4 (batch, groups, states, length), got {x.ndim}: shape {tuple(x.shape)}'
    )


def check_bidirectional_scan(forward, backward, z, scale) -> None:
    """Check the arguments of :func:`mmvim_ops.bidirectional_selective_scan`."""
    for name, direction in (('forward', forward), ('backward', backward)):
        try:
            check_scan(*direction[:6], z, direction.delta_bias)
        except (TypeError, ValueError) as error:
            raise type(error)(f'{name}: {error}') from None
    for what in ('shape', 'dtype', 'device'):
        ours, theirs = getattr(forward.u, what), getattr(backward.u, what)
        if ours != theirs:
            raise ValueError(
                f'forward.u and backward.u must have the same {what}, got {ours} and {theirs}'
            )
    if not isinstance(scale, (int, float)):
        raise TypeError(f'scale must be a number, got {type(scale).__name__}')


def check_conv1d(x, weight, bias, activation) -> None:
    """Check the arguments of :func:`mmvim_ops.causal_conv1d`."""
    check_tensor('x', x)
    check_rank('x', x, 3, '(batch, channels, length)')
    channels = x.shape[1]
    check_tensor('weight', weight, x, 'x')
    if (
        weight.ndim not in (2, 3)
        or weight.shape[-1] == 0
        or (tuple(weight.shape[:-1]) != (channels, 1)[: weight.ndim - 1])
    ):
        raise ValueError(
            f'weight must have shape (channels, taps) or (channels, 1, taps) with '
            f'{channels} channels and at least one tap, got {tuple(weight.shape)}'
        )
    if bias is not None:
        check_tensor('bias', bias, x, 'x')
        check_shape('bias', bias, (channels,), '(channels,)')
    if activation not in (None, 'silu'):
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")


def check_mixer(call) -> None:
    """Check the arguments of :func:`mmvim_ops.mamba_mixer`, given as a MixerCall."""
    tokens = call.tokens
    check_tensor('tokens', tokens)
    check_rank('tokens', tokens, 3, '(batch, length, C)')
    dims = tokens.shape[2]

    def check(name, x, shape, meaning):  # torch.compile of torch 2.4 traces no annotations here
        check_tensor(name, x, tokens, 'tokens')
        check_shape(name, x, shape, meaning)

    check_tensor('in_proj_weight', call.in_weight, tokens, 'tokens')
    check_rank('in_proj_weight', call.in_weight, 2, '(2 E, C)')
    inner = call.in_weight.shape[0] // 2
    check_shape('in_proj_weight', call.in_weight, (2 * inner, dims), '(2 E, C)')
    check_tensor('out_proj_weight', call.out_weight, tokens, 'tokens')
    check_rank('out_proj_weight', call.out_weight, 2, "(C', E)")
    outputs = call.out_weight.shape[0]
    check_shape('out_proj_weight', call.out_weight, (outputs, inner), "(C', E)")
    for name, x, shape, meaning in (
        ('norm_weight', call.norm_weight, (dims,), '(C,)'),
        ('in_proj_bias', call.in_bias, (2 * inner,), '(2 E,)'),
        ('out_proj_bias', call.out_bias, (outputs,), "(C',)"),
    ):
        if x is not None:
            check(name, x, shape, meaning)
    for index, direction in enumerate(call.directions):
        _check_mixer_direction(f'directions[{index}].', direction, inner, tokens, check)


def _check_mixer_direction(prefix: str, direction, inner: int, tokens: Tensor, check) -> None:
    for name in ('conv_weight', 'dt_proj_weight', 'A'):
        check_tensor(prefix + name, getattr(direction, name), tokens, 'tokens')
    for name, meaning in (('dt_proj_weight', '(E, R)'), ('A', '(E, N)')):
        check_rank(prefix + name, getattr(direction, name), 2, meaning)
    rank, states = direction.dt_proj_weight.shape[1], direction.A.shape[1]
    taps = direction.conv_weight.shape[-1] if direction.conv_weight.ndim else 0
    if tuple(direction.conv_weight.shape) not in ((inner, taps), (inner, 1, taps)) or taps == 0:
        raise ValueError(
            f'{prefix}conv_weight must have shape (E, taps) or (E, 1, taps) with E = {inner} and '
            f'at least one tap, got {tuple(direction.conv_weight.shape)}'
        )
    for name, shape, meaning in (
        ('conv_bias', (inner,), '(E,)'),
        ('x_proj_weight', (rank + 2 * states, inner), '(R + 2 N, E)'),
        ('dt_proj_weight', (inner, rank), '(E, R)'),
        ('dt_bias', (inner,), '(E,)'),
        ('A', (inner, states), '(E, N)'),
        ('D', (inner,), '(E,)'),
    ):
        x = getattr(direction, name)
        if x is not None or name not in ('conv_bias', 'D'):
            check(prefix + name, x, shape, meaning)
    if direction.order is not None:
        _check_order(f'{prefix}order', direction.order, tokens.shape[1])


def _check_order(name: str, order, length: int) -> None:
    """Raise unless ``order`` is a permutation, as far as its values are there to be looked at."""
    if not isinstance(order, Tensor):
        raise TypeError(f'{name} must be a tensor, got {type(order).__name__}')
    if order.dtype != torch.int64 or tuple(order.shape) != (length,):
        raise ValueError(
            f'{name} must be int64 of shape (length,) = {(length,)}, got {order.dtype} of shape '
            f'{tuple(order.shape)}'
        )
    # Values on a GPU would have to be waited for. Tracers (fake tensors) and transforms have none.
    traced = torch.compiler.is_compiling() or in_transform() or type(order) is not Tensor
    if traced or order.device.type != 'cpu':
        return
    if not order.sort().values.equal(torch.arange(length, device='cpu')):
        absent = min(set(range(length)) - set(order.tolist()))
        raise ValueError(
            f'{name} must have each of 0 to {length - 1} once, and does not have {absent}'
        )


def check_scan(u, delta, A, B, C, D, z, delta_bias) -> None:
    """Check the arguments of :func:`mmvim_ops.selective_scan`; see there for what is allowed."""
    check_tensor('u', u)
    check_rank('u', u, 3, '(batch, channels, length)')
    batch, channels, length = u.shape
    for name, x in (('delta', delta), ('A', A), ('B', B), ('C', C)):
        check_tensor(name, x, u)
    for name, x in (('D', D), ('z', z), ('delta_bias', delta_bias)):
        if x is not None:
            check_tensor(name, x, u)

    check_shape('delta', delta, (batch, channels, length), '(batch, channels, length)')
    check_rank('A', A, 2, '(channels, states)')
    states = A.shape[1]
    check_shape('A', A, (channels, states), '(channels, states)')
    if states == 0:
        raise ValueError(f'A must have at least one state, got shape {tuple(A.shape)}')
    groups = [
        check_input_matrix(name, x, batch, channels, states, length)
        for name, x in (('B', B), ('C', C))
    ]
    if None not in groups and groups[0] != groups[1]:
        raise ValueError(
            f'B and C must have the same number of groups, got {groups[0]} and {groups[1]}'
        )
    if z is not None:
        check_shape('z', z, (batch, channels, length), '(batch, channels, length)')
    for name, x in (('D', D), ('delta_bias', delta_bias)):
        if x is not None:
            check_shape(name, x, (channels,), '(channels,)')


def check_segment(out, state, direction: Direction, z) -> None:
    """Check what :func:`mmvim_ops.scan_segment_` changes in place, and that no gradient is asked
    for."""
    u, A = direction.u, direction.A
    check_tensor('out', out, u)
    check_shape('out', out, tuple(u.shape), '(batch, channels, length)')
    if any(step == 0 and side > 1 for step, side in zip(out.stride(), out.shape, strict=True)):
        raise ValueError(
            'out must have memory of its own for each element, got one that is expanded: shape '
            f'{tuple(out.shape)}, strides {out.stride()}'
        )
    check_tensor('state', state, u)
    check_shape('state', state, (*u.shape[:2], A.shape[1]), '(batch, channels, states)')
    for name, x, dtype in (('out', out, u.dtype), ('state', state, compute_dtype(u.dtype))):
        if x.dtype != dtype:
            raise TypeError(f'{name} must be {dtype} for u of {u.dtype}, got {x.dtype}')
    if not state.is_contiguous():
        raise ValueError(f'state must be contiguous, got strides {state.stride()}')
    given = [x for x in (out, state, z, *direction) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        raise ValueError(
            'scan_segment_ is for inference, but an argument requires a gradient: '
            'use selective_scan, or torch.inference_mode()'
        )


def in_forward_mode() -> bool:
    """Whether something is differentiated in forward mode, whatever the tensors."""
    return getattr(forward_ad, '_current_level', 0) >= 0


def in_transform() -> bool:
    """Whether the call is inside of a transform of torch.func; a compiler traces these itself."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def refuse_forward_mode(function: str, *tensors: Tensor | None) -> None:
    """Raise where forward-mode differentiation has reached an argument: without a formula torch
    would take its derivative for zero."""
    # Asking every tensor costs a microsecond each. Outside of forward mode this suffices.
    if not in_forward_mode():
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            f'mmvim_ops.{function} has no forward-mode derivatives (torch.func.jvp, jacfwd, dual '
            'tensors): use reverse mode, such as torch.autograd.grad'
        )
