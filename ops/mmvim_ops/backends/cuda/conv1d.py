"""The convolution's operators over the kernels of ``csrc/cuda``."""

import torch
from torch import Tensor

from ..operators import like
from .library import DTYPES, address, call, constant, sequence, stream
from .structures import Convolution


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
