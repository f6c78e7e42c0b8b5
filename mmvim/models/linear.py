"""Linear layers for token sequences."""

from __future__ import annotations

from torch import Tensor, nn

from mmvim_ops import linear

__all__ = ['Linear', 'linear']


class Linear(nn.Linear):
    """``nn.Linear`` for (B, L, C) tokens, computed by :func:`mmvim_ops.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
