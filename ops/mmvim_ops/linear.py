"""Matrix products by the fastest of what there is for them on the CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import selected
from .backends.cpp import linear as cpp
from .checks import in_forward_mode

FEW = 20480  # numbers in a single image up to which torch does not ask oneDNN for a convolution


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """``x @ weight.T + bias`` of (batch, length, in) tokens, differentiable as usual.

    For inference in float32 on the CPU it is computed by a kernel of backend ``'cpp'``, where that
    is compiled and no other backend is asked for. With gradients it is asked for as a convolution:
    torch computes ``F.linear`` with MKL, which uses half of the vector width of AMD processors, and
    convolutions with oneDNN, which uses all of it (docs/efficiency.md has the figures). A token is
    a pixel and a linear layer a 1 × 1 convolution. Nothing is copied: (batch, length, channels)
    memory is a channels-last image.

    Args:
        x (Tensor): (batch, length, in).
        weight (Tensor): (out, in), as in ``nn.Linear``.
        bias (Tensor | None): (out,).
        backend (str | None): As of :func:`selective_scan`; what is not for the kernel of ``'cpp'``
            is torch's, whatever the backend.

    Returns:
        Tensor: (batch, length, out).
    """
    if not _as_convolution(x, weight):
        return F.linear(x, weight, bias)
    ours = selected(backend) in (None, 'cpp') and cpp.takes(x, weight, bias)
    if ours and not in_forward_mode():
        return torch.ops.mmvim_ops.cpp_linear(x, weight, bias)
    if x.shape[0] == 1 and x.numel() <= FEW:
        return F.linear(x, weight, bias)
    image = x.transpose(1, 2).unsqueeze(2)  # (B, in, 1, L)
    # Dilation does nothing to a kernel of one pixel, but lets torch ask oneDNN on one thread, too.
    image = F.conv2d(image, weight[:, :, None, None], bias, dilation=2)  # (B, out, 1, L)
    return image.squeeze(2).transpose(1, 2)  # (B, L, out)


def _as_convolution(x: Tensor, weight: Tensor) -> bool:
    # Compilers choose libraries themselves, and cannot trace the questions that follow.
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return (
        x.device.type == 'cpu'
        and x.dtype == weight.dtype == torch.float32
        and x.ndim == 3
        and x.numel() > 0
        and x.is_contiguous()
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled('cpu')
    )
