"""The whole mixer of backend 'cpp': one call that goes through the sequence in segments."""

import torch
from torch import Tensor

from .cpp_backend import CHUNK, MISSING, MOST_TAPS
from .registration import needs_gradient
from .torch_scan import refuse_second_derivative

SAVE = {'activations': 1, 'all': 2}  # enum Save of csrc/cpu/mixer.cpp
NO_DIRECTION = (None,) * 7


def mixer_why_not(tokens, weights, directions, recompute) -> str | None:
    """Why the mixer must be put together from the single operations; None where it need not."""
    if recompute == 'none':
        return "recompute='none' stores everything"
    if torch.is_autocast_enabled('cpu'):
        return 'autocast chooses the dtype of each projection'
    if tokens.dtype not in (torch.float32, torch.float64):
        return f'it takes float32 and float64, got {tokens.dtype}'
    for direction in directions:
        if direction.order is not None:
            return 'it reads tokens in their order'
        if direction.conv_weight.shape[-1] > MOST_TAPS:
            return f'it has at most {MOST_TAPS} taps'
    given = [*weights, *(x for direction in directions for x in direction[:7])]
    if any(x is not None and x.dtype != tokens.dtype for x in given):
        return 'all tensors must have one dtype'
    return None


def mixer(tokens, in_weight, in_bias, out_weight, out_bias, directions, scale, recompute) -> Tensor:
    """As :func:`mmvim_ops.mamba_mixer`, for what :func:`mixer_why_not` lets through."""
    flat, reversed_ = [], []
    for direction in directions:
        conv_weight = direction.conv_weight
        flat += [conv_weight.flatten(1), *direction[1:7]]
        conv_reverse = direction.conv_reverse
        reverse = bool(direction.reverse)
        reversed_ += [int(reverse), int(reverse if conv_reverse is None else conv_reverse)]
    if len(directions) == 1:
        flat += NO_DIRECTION
    tensors = [tokens, in_weight, in_bias, out_weight, out_bias, *flat]
    save = SAVE[recompute] if needs_gradient(*tensors) else 0
    return torch.ops.mmvim_ops.cpp_mamba_mixer(*tensors, reversed_, float(scale), save)[0]


def _fake_mixer(*arguments):
    tokens, in_weight, _, out_weight = arguments[:4]
    save = arguments[-1]
    batch, length, _ = tokens.shape
    inner = in_weight.shape[0] // 2
    per_call = torch.ops.mmvim_ops.cpp_mamba_mixer_tokens()
    segments = torch.sym_max(1, (length + per_call // 2) // per_call)
    longest = torch.sym_max((length + segments - 1) // segments, 1)
    rows = segments * (1 + (longest - 1) // CHUNK) * batch

    def states(A):
        return tokens.new_empty(rows if save else 0, inner * A.shape[1])

    A, A_b = arguments[10], arguments[17]
    return (
        tokens.new_empty(batch, length, out_weight.shape[0]),
        tokens.new_empty((batch, length, 2 * inner) if save == 1 else (0,)),
        states(A),
        tokens.new_empty(0, 0) if A_b is None else states(A_b),
    )


def _fake_mixer_backward(grad_out, *arguments):
    return [grad_out.new_empty(0) if x is None else x.new_empty(x.shape) for x in arguments[:19]]


def _save(ctx, inputs, output):
    *tensors, ctx.reversed, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx, grad_out, *_):
    *tensors, xz, states, states_b = ctx.saved_tensors
    grads = torch.ops.mmvim_ops.cpp_mamba_mixer_backward(
        grad_out, *tensors, ctx.reversed, ctx.scale, xz, states, states_b
    )
    given = (None if x is None else grad for x, grad in zip(tensors, grads, strict=True))
    return *given, None, None, None


if MISSING is None:
    torch.library.register_fake('mmvim_ops::cpp_mamba_mixer', _fake_mixer)
    torch.library.register_fake('mmvim_ops::cpp_mamba_mixer_backward', _fake_mixer_backward)
    torch.library.register_autograd('mmvim_ops::cpp_mamba_mixer', _backward, setup_context=_save)
    torch.library.register_autograd('mmvim_ops::cpp_mamba_mixer_backward', refuse_second_derivative)
