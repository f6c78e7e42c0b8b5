"""Predictions for pictures of any size.

mmseg's, mmdet's and mmpretrain's inferencers are not used. They read pictures by themselves, with
the faults that :mod:`.pictures` names, stop at the first file that cannot be read, keep all results
until the last, and give weights that do not fit a warning. Their pipelines, models and data samples
are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from mmengine.registry import DefaultScope
from mmengine.structures import BaseDataElement, PixelData
from torch import Tensor, nn

from mmvim.models.arguments import integer

from .pictures import read_picture, to_rgb
from .pipelines import build_pipeline

__all__ = ['best_class', 'predict']

# Class scores at the picture's size are held for as many classes at a time as fit: 256 MiB.
SCORES_AT_A_TIME = 2**26


def predict(
    model: nn.Module,
    pictures: str | Path | np.ndarray | Sequence[str | Path | np.ndarray],
    batch_size: int = 1,
    depth: int | None = None,
) -> list[BaseDataElement]:
    """Predict pictures through the config's test pipeline, each as if it were alone.

    Args:
        model (nn.Module): From :func:`~mmvim.apis.load_model`.
        pictures (str | Path | np.ndarray | Sequence): One or several; files, or arrays of (H, W)
            grey, (H, W, 3) **RGB** or (H, W, 4) RGBA, of uint8 or uint16. OpenMMLab's own functions
            take BGR.
        batch_size (int): Pictures in one pass. Those whose sizes differ after the pipeline go in
            passes of their own, as padding would change what a global model makes of them.
        depth (int, optional): Bits of 16-bit samples; see :func:`~mmvim.apis.read_picture`.

    Returns:
        list[BaseDataElement]: A data sample for each picture, on the CPU and at the size of the
        picture: mmseg's with ``pred_sem_seg.data`` (1, H, W), mmdet's with ``pred_instances``,
        mmpretrain's with ``pred_label`` and ``pred_score``. mmseg's ``seg_logits`` are left out,
        as at the size of a photo they take gigabytes.

    Raises:
        PictureError: A file or an array is no picture.
        UserError: The config's test pipeline is not one for single pictures.
        TypeError, ValueError: ``batch_size`` is no positive integer.
    """
    batch_size = integer('batch_size', batch_size)
    if isinstance(pictures, str | Path | np.ndarray):
        pictures = [pictures]
    samples = []
    with DefaultScope.overwrite_default_scope(model.cfg.default_scope), torch.no_grad():
        pipeline = build_pipeline(model.cfg)
        for start in range(0, len(pictures), batch_size):
            items = [_prepare(p, pipeline, depth) for p in pictures[start : start + batch_size]]
            for _, equal in groupby(items, key=lambda item: item['inputs'].shape):
                samples += [sample.cpu() for sample in _forward(model, list(equal))]
    return samples


def _prepare(picture: str | Path | np.ndarray, pipeline, depth: int | None) -> dict:
    path = ''
    if not isinstance(picture, np.ndarray):
        path, picture = str(picture), read_picture(picture, depth)
    image = np.ascontiguousarray(to_rgb(picture, depth)[..., ::-1])
    size = image.shape[:2]
    return pipeline(dict(img=image, img_shape=size, ori_shape=size, img_path=path, img_id=0))


def _forward(model: nn.Module, items: list[dict]) -> list[BaseDataElement]:
    batch = pseudo_collate(items)
    if model.cfg.default_scope == 'mmseg' and getattr(model, 'out_channels', 1) > 1:
        return _segment(model, batch)
    return model.test_step(batch)


def _segment(model: nn.Module, batch: dict) -> list[BaseDataElement]:
    """mmseg's result, without the scores of all classes at the size of the picture at once.

    mmseg resizes them to ``ori_shape``; given the size that the network sees, it leaves them.
    """
    sizes = [sample.ori_shape for sample in batch['data_samples']]
    for sample in batch['data_samples']:
        sample.set_metainfo(dict(ori_shape=sample.img_shape[:2]))
    samples = model.test_step(batch)
    for sample, size in zip(samples, sizes, strict=True):
        scores = sample.seg_logits.data
        del sample.seg_logits
        sample.set_metainfo(dict(ori_shape=size))
        if size != tuple(scores.shape[-2:]):
            labels = best_class(scores, size, bool(model.align_corners))
            sample.pred_sem_seg = PixelData(data=labels)
    return samples


def best_class(scores: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """(C, h, w) scores to (1, H, W) labels: ``resize(scores, size).argmax(0)``, in less memory."""
    at_a_time = max(1, SCORES_AT_A_TIME // (size[0] * size[1]))
    best, labels = None, None
    for start in range(0, len(scores), at_a_time):
        some = nn.functional.interpolate(
            scores[None, start : start + at_a_time],
            size,
            mode='bilinear',
            align_corners=align_corners,
        )[0]
        highest, index = some.max(0)
        if best is None:
            best, labels = highest, index
        else:
            better = highest > best
            best = torch.where(better, highest, best)
            labels = torch.where(better, index + start, labels)
    return labels[None]
