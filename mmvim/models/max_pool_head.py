"""The classifier of the paper's max-pooling ablation; needs mmpretrain."""

from __future__ import annotations

from mmpretrain.models import LinearClsHead
from mmpretrain.registry import MODELS
from torch import Tensor

__all__ = ['MaxPoolClsHead']


@MODELS.register_module()
class MaxPoolClsHead(LinearClsHead):
    """Scores every token and takes each class's maximum over them.

    For a backbone with ``out_type='raw'``. Arguments are those of ``LinearClsHead``.
    """

    def forward(self, feats: tuple[Tensor]) -> Tensor:
        """Tokens (B, M, C), the last of ``feats``, to scores (B, num_classes)."""
        return self.fc(self.pre_logits(feats)).amax(dim=1)  # (B, num_classes)
