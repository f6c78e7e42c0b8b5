"""A batch as a data loader gives it, of generated pictures, for measurements without a data set."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from mmengine.structures import InstanceData, PixelData

from .shapes import Scene, draw_scene

__all__ = ['generate_batch']


def resize(image: np.ndarray, size: int) -> np.ndarray:
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_NEAREST)


def detection_sample(scene: Scene, size: int):
    from mmdet.structures import DetDataSample
    from mmdet.structures.bbox import HorizontalBoxes
    from mmdet.structures.mask import BitmapMasks

    masks = [resize(instance.mask.astype(np.uint8), size) for instance in scene.instances]
    masks = BitmapMasks(masks, size, size)
    truth = InstanceData(
        bboxes=HorizontalBoxes.from_instance_masks(masks).tensor,
        labels=torch.tensor([instance.label - 1 for instance in scene.instances]),
        masks=masks,
    )
    nothing = InstanceData(bboxes=torch.empty(0, 4), labels=torch.empty(0, dtype=torch.long))
    return DetDataSample(gt_instances=truth, ignored_instances=nothing)


def segmentation_sample(scene: Scene, size: int):
    from mmseg.structures import SegDataSample

    labels = resize(scene.semantic - np.uint8(1), size).astype(np.int64)  # unlabelled: 0 → 255
    return SegDataSample(gt_sem_seg=PixelData(data=torch.from_numpy(labels)[None]))


def generate_batch(scope: str, batch_size: int, size: int) -> dict:
    """What a data loader of this scope gives, before the model's data preprocessor.

    Args:
        scope (str): ``'mmdet'`` (boxes and masks) or ``'mmseg'`` (label maps).
        batch_size (int): Pictures.
        size (int): Their side in pixels.
    """
    make = {'mmdet': detection_sample, 'mmseg': segmentation_sample}[scope]
    inputs, samples = [], []
    for seed in range(batch_size):
        scene = draw_scene(np.random.default_rng(seed), size=128)
        sample = make(scene, size)
        shape = dict(img_shape=(size, size), ori_shape=(size, size), pad_shape=(size, size))
        sample.set_metainfo(dict(shape, img_id=seed, scale_factor=(1.0, 1.0)))
        image = resize(scene.image, size).transpose(2, 0, 1)  # (3, H, W)
        inputs.append(torch.from_numpy(np.ascontiguousarray(image)))
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)
