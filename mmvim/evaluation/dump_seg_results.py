"""Predictions of a segmentor in a file."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmengine.evaluator import DumpResults
from mmseg.registry import METRICS
from torch import Tensor

__all__ = ['DumpSegResults']


@METRICS.register_module()
class DumpSegResults(DumpResults):
    """mmengine's ``DumpResults`` without the logits, and with label maps of one byte a pixel.

    The logits of 150 classes are 600 bytes a pixel, which no machine holds for a whole data set.
    mmengine's ``Evaluator.offline_evaluate`` computes metrics from what is left.

    Arguments are those of ``mmengine.evaluator.DumpResults``.
    """

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        super().process(data_batch, [compact(sample) for sample in data_samples])


def compact(sample: dict) -> dict:
    """A shallow copy: no logits, and label maps of the smallest type that holds them."""
    return {
        key: dict(value, data=narrow(value['data'])) if key.endswith('sem_seg') else value
        for key, value in sample.items()
        if key != 'seg_logits'
    }


def narrow(labels: Tensor) -> Tensor:
    """Label maps as uint8 where no label is above 255."""
    fits = labels.numel() == 0 or (labels.min() >= 0 and labels.max() <= 255)
    return labels.to(torch.uint8) if fits else labels
