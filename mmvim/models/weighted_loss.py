"""Cross entropy for segmentation whose classes differ in size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from .arguments import number

__all__ = ['ClassWeightedLoss']


@MODELS.register_module()
class ClassWeightedLoss(nn.Module):
    """Cross entropy with a weight per class, averaged by the weights of the pixels that count.

    mmseg's ``CrossEntropyLoss`` looks up the weight of ignored pixels as well, and fails at label
    255 where there are fewer classes.

    Args:
        class_weight (Sequence[float]): One positive number per class.
        loss_weight (float): Factor of the loss.
        loss_name (str): Key in the log; mmseg adds up those that begin with ``'loss_'``.

    Raises:
        TypeError, ValueError: For a weight that is not a positive number.
    """

    class_weight: Tensor  # (classes,)

    def __init__(
        self,
        class_weight: Sequence[float],
        loss_weight: float = 1.0,
        loss_name: str = 'loss_ce',
    ) -> None:
        super().__init__()
        weights = [number('class_weight', weight) for weight in class_weight]
        self.register_buffer('class_weight', torch.tensor(weights), persistent=False)
        self.loss_weight = number('loss_weight', loss_weight)
        self.loss_name = loss_name

    def forward(
        self, pred: Tensor, label: Tensor, weight: Tensor | None = None, ignore_index: int = 255
    ) -> Tensor:
        """Scores (B, classes, H, W) and labels (B, H, W) to a number.

        ``weight`` (B, H, W) is a pixel's own, as from mmseg's samplers. Where every pixel is
        ignored the loss is 0.

        Raises:
            ValueError: The number of classes is not that of ``class_weight``.
        """
        if pred.shape[1] != len(self.class_weight):
            raise ValueError(
                f'class_weight has {len(self.class_weight)} numbers, the scores have '
                f'{pred.shape[1]} classes'
            )
        counts = label != ignore_index
        each = F.cross_entropy(
            pred, label, self.class_weight, ignore_index=ignore_index, reduction='none'
        )  # (B, H, W), 0 where ignored
        of_label = self.class_weight[label.where(counts, 0)] * counts  # (B, H, W)
        if weight is not None:
            each, of_label = each * weight, of_label * weight
        tiny = torch.finfo(of_label.dtype).tiny
        return self.loss_weight * each.sum() / of_label.sum().clamp(min=tiny)
