"""The convolution's operators over the kernels of ``csrc/cuda``."""

import torch
from torch import Tensor

from ..operators import like
from .library import DTYPES, address, call, constant, sequence, stream
from .structures import Convolution, SecondFilter


def _arguments(x: Tensor, weight: Tensor, bias: Tensor | None, silu, reverse) -> dict:
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


def conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    """Operator ``cuda_conv1d``."""
    out, weight, bias = torch.empty_like(x), _packed(weight), _packed(bias)
    if x.numel() > 0:
        arguments = _arguments(x, weight, bias, silu, reverse)
        call('mmvim_conv_forward', x, Convolution(**arguments, out=sequence(out)))
    return out


def conv1d_pair(
    x: Tensor,
    first: tuple[Tensor, Tensor | None, bool],
    second: tuple[Tensor, Tensor | None, bool],
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """Two convolutions of one x without gradients; it is read once where they run in opposite
    directions with four taps.

    Args:
        x (Tensor): (B, D, L).
        first, second (tuple): Weight (D, taps), the same number of taps for both; bias (D) or None;
            whether it runs from the end to the start.
        silu (bool): Whether SiLU follows, for both.

    Returns:
        tuple[Tensor, Tensor]: Both as x.
    """
    outs = torch.empty_like(x), torch.empty_like(x)
    if x.numel() > 0:
        (weight, bias, reverse), (weight_b, bias_b, reverse_b) = (
            (_packed(weight), _packed(bias), reverse) for weight, bias, reverse in (first, second)
        )
        other = SecondFilter(reverse_b, sequence(outs[1]), weight_b.data_ptr(), address(bias_b))
        arguments = _arguments(x, weight, bias, silu, reverse)
        arguments |= dict(out=sequence(outs[0]), second=other)
        call('mmvim_conv_forward', x, Convolution(**arguments))
    return outs


def conv1d_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Operator ``cuda_conv1d_backward``."""
    grad_x, packed, packed_bias = torch.empty_like(x), _packed(weight), _packed(bias)
    tiles = -(-x.shape[2] // constant('conv_steps'))
    shape = (x.shape[0], tiles, x.shape[1], weight.shape[1] + 1)
    sums = torch.empty(shape, dtype=torch.float32, device=x.device)
    if x.numel() > 0:
        grad_out = grad_out.to(x.dtype)
        arguments = _arguments(x, packed, packed_bias, silu, reverse)
        arguments |= dict(grad_out=sequence(grad_out), grad_x=sequence(grad_x))
        call('mmvim_conv_backward', x, Convolution(**arguments, grad_parameters=sums.data_ptr()))
    sums = sums.sum((0, 1))  # (D, taps + 1)
    grad_weight = sums[:, :-1].to(weight.dtype, copy=True, memory_format=torch.contiguous_format)
    grad_bias = like(None, x) if bias is None else sums[:, -1].contiguous().to(bias.dtype)
    return grad_x, grad_weight, grad_bias


IMPLEMENTATIONS = {'conv1d': conv1d, 'conv1d_backward': conv1d_backward}
