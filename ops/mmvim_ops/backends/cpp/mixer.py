"""The whole mixer as one operator, which goes through the sequence in stretches."""

import torch
from torch import Tensor

from ...calls import MixerCall, MixerDirection
from ..operators import (
    needs_gradient,
    only_given,
    refuse_second_derivative,
    register_gradient,
)
from . import library

SAVE = {'activations': 1, 'all': 2}  # enum Save of csrc/cpu/mixer.h
OF_DIRECTION = 7  # tensors of a MixerDirection, which come first in it


def why_not(call: MixerCall) -> str | None:
    """Why the mixer is composed of the single operations; None where this operator takes it."""
    if call.recompute == 'none':
        return "recompute='none' stores everything"
    dtype = half_precision(call)
    if dtype is not None and needs_gradient(*_tensors(call)):
        return f'it trains in float32 and float64, not in {dtype}'
    most = library.CONSTANTS['most_taps']
    for direction in call.directions:
        if direction.order is not None and dtype is not None:
            return f'it adds up directions with orders of their own after rounding them to {dtype}'
        if direction.conv_weight.shape[-1] > most:
            return f'it has at most {most} taps'
    if torch.is_autocast_enabled('cpu'):
        return 'autocast leaves float64 alone' if call.tokens.dtype == torch.float64 else None
    for x in _tensors(call) if dtype is None else _factors(call):
        if x is not None and x.dtype != call.tokens.dtype:
            return 'all tensors must have one dtype'
    return None


def half_precision(call: MixerCall) -> torch.dtype | None:
    """That of the result; None where it is float32 or float64."""
    if torch.is_autocast_enabled('cpu'):
        return torch.get_autocast_dtype('cpu')
    dtype = call.tokens.dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


def _factors(call: MixerCall) -> list[Tensor | None]:
    """What :func:`mmvim_ops.linear` and the norm would take, who want one dtype."""
    projections = [x for o in call.directions for x in (o.x_proj_weight, o.dt_proj_weight)]
    return [*call[1:6], *projections]


def _tensors(call: MixerCall) -> list[Tensor | None]:
    """Those of the operator, in the order of its schema."""
    found = [*call[:6]]
    for direction in call.directions:
        found += [direction.conv_weight.flatten(1), *direction[1:OF_DIRECTION]]
    if len(call.directions) == 1:
        found += [None] * OF_DIRECTION
    return found


def mamba_mixer(call: MixerCall) -> Tensor:
    """For what :func:`why_not` lets through.

    The operator reads tokens as they lie. All but the convolution and the scan takes them one by
    one, so that a direction with an order of its own is a mixer of the tokens in that order.
    """
    if all(direction.order is None for direction in call.directions):
        return _operator(call)
    first, *others = (_alone(call, direction) for direction in call.directions)
    out = sum(others, first)
    return out if call.out_bias is None else out + call.out_bias


def _alone(call: MixerCall, direction: MixerDirection) -> Tensor:
    """What one direction adds to the output, (B, L, C')."""
    order = direction.order
    call = call._replace(directions=(direction._replace(order=None),), out_bias=None)
    if order is None:
        return _operator(call)
    out = _operator(call._replace(tokens=call.tokens.index_select(1, order)))
    return out.index_select(1, order.argsort())


def _operator(call: MixerCall) -> Tensor:
    reverse = []
    for direction in call.directions:
        conv_reverse = direction.conv_reverse
        scan_reverse = bool(direction.reverse)
        reverse += [int(scan_reverse), int(scan_reverse if conv_reverse is None else conv_reverse)]
    tensors, dtype = _tensors(call), half_precision(call)
    if dtype is not None:
        tokens, *others = tensors
        others = [x if x is None or x.dtype == torch.float32 else x.float() for x in others]
        return torch.ops.mmvim_ops.cpp_mamba_mixer_half(
            tokens, *others, reverse, call.scale, call.norm_eps, dtype
        )
    save = SAVE[call.recompute] if needs_gradient(*tensors) else 0
    return torch.ops.mmvim_ops.cpp_mamba_mixer(*tensors, reverse, call.scale, call.norm_eps, save)[
        0
    ]


def _fake_mixer(*arguments):
    *tensors, _, _, _, save = arguments
    tokens, _, in_weight, _, out_weight, _, *rest = tensors
    first, second = (MixerDirection(*rest[i : i + OF_DIRECTION]) for i in (0, OF_DIRECTION))
    batch, length, _ = tokens.shape
    inner = in_weight.shape[0] // 2
    per_call = torch.ops.mmvim_ops.cpp_mamba_mixer_tokens()
    stretches = torch.sym_max(1, (length + per_call // 2) // per_call)
    longest = torch.sym_max((length + stretches - 1) // stretches, 1)
    rows = stretches * (1 + library.saved_states(longest)) * batch

    def states(A):
        return tokens.new_empty(rows if save else 0, inner * A.shape[1])

    return (
        tokens.new_empty(batch, length, out_weight.shape[0]),
        tokens.new_empty((batch, length, 2 * inner) if save == 1 else (0,)),
        states(first.A),
        tokens.new_empty(0, 0) if second.A is None else states(second.A),
    )


def _fake_mixer_half(tokens, *arguments):
    out_weight, dtype = arguments[3], arguments[-1]
    return tokens.new_empty(*tokens.shape[:2], out_weight.shape[0], dtype=dtype)


def _fake_mixer_backward(grad_out, *arguments):
    *tensors, _, _, _, _, _, _ = arguments
    return [grad_out.new_empty(0) if x is None else x.new_empty(x.shape) for x in tensors]


def _save(ctx, inputs, output):
    *tensors, ctx.reversed, ctx.scale, ctx.norm_eps, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx, grad_out, *_):
    *tensors, xz, states, states_b = ctx.saved_tensors
    if grad_out is None:
        tokens, out_weight = tensors[0], tensors[4]
        grad_out = tokens.new_zeros(*tokens.shape[:2], out_weight.shape[0])
    grads = torch.ops.mmvim_ops.cpp_mamba_mixer_backward(
        grad_out, *tensors, ctx.reversed, ctx.scale, ctx.norm_eps, xz, states, states_b
    )
    return *only_given(tensors, grads), None, None, None, None


def register() -> None:
    """Tell torch of the shapes and gradients of the operators, which the library has defined."""
    for name, fake in (
        ('mamba_mixer', _fake_mixer),
        ('mamba_mixer_half', _fake_mixer_half),
        ('mamba_mixer_backward', _fake_mixer_backward),
    ):
        torch.library.register_fake(f'mmvim_ops::cpp_{name}', fake)
    register_gradient('mmvim_ops::cpp_mamba_mixer', _save, _backward)
    for name in ('half', 'backward'):
        register_gradient(f'mmvim_ops::cpp_mamba_mixer_{name}', None, refuse_second_derivative)


if library.MISSING is None:
    register()
