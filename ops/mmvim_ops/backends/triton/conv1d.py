"""The convolution's operators: launches ``conv1d_kernels.py``."""

import torch
from torch import Tensor

from ...naive import compute_dtype
from ..operators import like

STEPS, WIDTH = 64, 32  # of a program's tile: time by channels


def _strided(x: Tensor | None) -> tuple | None:
    """How kernels take a tensor."""
    return None if x is None else (x, *x.stride())


def _launch(kernel: str, x: Tensor, weight: Tensor, *arguments, **more) -> None:
    import triton.language as tl

    from . import conv1d_kernels

    batch, channels, length = x.shape
    grid = (batch * -(-length // STEPS) * -(-channels // WIDTH),)
    with torch.cuda.device_of(x):
        getattr(conv1d_kernels, kernel)[grid](
            *arguments,
            length=length,
            channels=channels,
            TAPS=weight.shape[1],
            STEPS=STEPS,
            WIDTH=WIDTH,
            DTYPE=tl.float64 if x.dtype == torch.float64 else tl.float32,
            **more,
        )


def conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    """Operator ``triton_conv1d``."""
    out = torch.empty_like(x)
    if x.numel() > 0:
        tensors = map(_strided, (x, weight, bias, out))
        _launch('forward', x, weight, *tensors, SILU=silu, REVERSE=reverse)
    return out


def conv1d_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Operator ``triton_conv1d_backward``."""
    batch, channels, length = x.shape
    dtype = compute_dtype(x.dtype)
    grad_x, grad_y = torch.empty_like(x), torch.empty_like(x, dtype=dtype)
    rows = batch * -(-length // STEPS)
    sums = x.new_empty(rows, weight.shape[1] + 1, channels, dtype=dtype)
    if x.numel() > 0:
        tensors = map(_strided, (grad_out, x, weight, bias, grad_y))
        _launch('backward', x, weight, *tensors, sums, SILU=silu, REVERSE=reverse)
        # The gradient of x is the convolution of that of y, seen from the other end.
        tensors = map(_strided, (grad_y, weight, None, grad_x))
        _launch('forward', x, weight, *tensors, SILU=False, REVERSE=not reverse)
    sums = sums.sum(0)  # (taps + 1, D)
    grad_weight = sums[:-1].T.to(weight.dtype, copy=True, memory_format=torch.contiguous_format)
    return (
        grad_x,
        grad_weight,
        like(None, x) if bias is None else sums[-1].to(bias.dtype, copy=True),
    )


IMPLEMENTATIONS = {'conv1d': conv1d, 'conv1d_backward': conv1d_backward}
