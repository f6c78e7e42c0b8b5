"""Matrix products by the faster of the two libraries that torch has for them on the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ['Linear', 'linear']


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` of (B, L, in) tokens: (B, L, out), differentiable as usual.

    In float32 on the CPU torch computes ``F.linear`` with MKL, which uses half of the vector width
    of AMD processors, and convolutions with oneDNN, which uses all of it. A token is a pixel and a
    linear layer a 1 × 1 convolution, so the product is asked for as one (docs/efficiency.md has the
    figures). Nothing is copied: (B, L, C) memory is a channels-last image.
    """
    if not _as_convolution(x, weight):
        return F.linear(x, weight, bias)
    image = x.transpose(1, 2).unsqueeze(2)  # (B, in, 1, L)
    image = F.conv2d(image, weight[:, :, None, None], bias)  # (B, out, 1, L)
    return image.squeeze(2).transpose(1, 2)  # (B, L, out)


def _as_convolution(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == 'cpu'
        and x.dtype == weight.dtype == torch.float32
        and x.ndim == 3
        and x.numel() > 0
        and x.is_contiguous()
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled('cpu')
        and not torch.compiler.is_compiling()  # which has its own choice of libraries
    )


class Linear(nn.Linear):
    """``nn.Linear`` for (B, L, C) tokens, computed by :func:`linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
