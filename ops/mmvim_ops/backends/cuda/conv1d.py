"""The convolution's operators over the kernels of ``csrc/cuda``."""

import torch
from torch import Tensor

from ..operators import fake_conv1d_backward
from .library import (
    DTYPES,
    address,
    call,
    cast,
    constant,
    gradient,
    memory,
    packed,
    sequence,
    stream,
)
from .structures import NO_GRADIENT, NO_SECOND, NO_SEQUENCE, Convolution, filled

# What a convolution has of the backward pass.
NO_BACKWARD = (*NO_SEQUENCE, *NO_SEQUENCE, 0, *NO_GRADIENT, *NO_GRADIENT)


def _given(x: Tensor, out: Tensor | None, weight: Tensor, bias: Tensor | None, *flags) -> tuple:
    """The values of a structure up to ``bias``."""
    sizes = DTYPES[x.dtype], x.device.index or 0, stream(x.device), *x.shape, weight.shape[1]
    return *sizes, *flags, *sequence(x), *sequence(out), weight.data_ptr(), address(bias)


def conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    """Operator ``cuda_conv1d``."""
    out = torch.empty_like(x)
    if x.numel() > 0:
        weight, bias = packed(weight), packed(bias)
        values = (
            *_given(x, out, weight, bias, silu, reverse),
            *(*NO_BACKWARD, *NO_SECOND),
        )
        call('mmvim_conv_forward', x.device, filled(Convolution, values))
    return out


def conv1d_pair(
    x: Tensor,
    first: tuple[Tensor, Tensor | None, bool],
    second: tuple[Tensor, Tensor | None, bool],
    silu: bool,
    outs: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Two convolutions of one x without gradients; it is read once where they run in opposite
    directions with four taps.

    Args:
        x (Tensor): (B, D, L).
        first, second (tuple): Weight (D, taps), the same number of taps for both; bias (D) or None;
            whether it runs from the end to the start.
        silu (bool): Whether SiLU follows, for both.
        outs (tuple[Tensor, Tensor] | None): Where the results go to.

    Returns:
        tuple[Tensor, Tensor]: Both as x.
    """
    outs = (torch.empty_like(x), torch.empty_like(x)) if outs is None else outs
    if x.numel() > 0:
        (weight, bias, reverse), (weight_b, bias_b, reverse_b) = (
            (packed(weight), packed(bias), reverse) for weight, bias, reverse in (first, second)
        )
        values = (
            *_given(x, outs[0], weight, bias, silu, reverse),
            *NO_BACKWARD,
            *(reverse_b, *sequence(outs[1]), weight_b.data_ptr(), address(bias_b)),
        )
        call('mmvim_conv_forward', x.device, filled(Convolution, values))
    return outs


def conv1d_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Operator ``cuda_conv1d_backward``."""
    grads = fake_conv1d_backward(grad_out, x, weight, bias, silu, reverse)
    if x.numel() == 0:
        return tuple(grad.zero_() for grad in grads)
    grad_x, grad_weight, grad_bias = grads
    grad_out, weight, read_bias = cast(grad_out, x.dtype), packed(weight), packed(bias)
    tiles = -(-x.shape[2] // constant('conv_steps'))
    sums = memory(x.shape[0] * tiles * x.shape[1] * (weight.shape[1] + 1), x.device)
    values = (
        *_given(x, None, weight, read_bias, silu, reverse),
        *(*sequence(grad_out), *sequence(grad_x), sums.data_ptr()),
        *(*gradient(grad_weight, weight), *gradient(grad_bias, bias), *NO_SECOND),
    )
    call('mmvim_conv_backward', x.device, filled(Convolution, values))
    return grads


IMPLEMENTATIONS = {'conv1d': conv1d, 'conv1d_backward': conv1d_backward}
