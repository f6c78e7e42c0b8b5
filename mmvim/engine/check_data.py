"""Data and model that do not fit are found before the first step."""

from __future__ import annotations

import logging
import time

import mmcv
import numpy as np
import torch
from mmcv.transforms import LoadAnnotations
from mmengine import fileio
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop
from torch import nn

from mmvim.utils.data import describe, leaves
from mmvim.utils.errors import UserError

__all__ = ['CheckDataHook', 'heads_of']

# Parts of a model whose classes are not those of the data: those of ImageNet, of object or not, of
# another task.
OTHER_PARTS = {'backbone', 'rpn_head', 'semantic_head', 'reid'}
OTHER_HEADS = {'STDCHead', 'VPDDepthHead'}
UNLABELLED = 255  # in label maps


@HOOKS.register_module()
class CheckDataHook(Hook):
    """Compares the heads' ``num_classes`` with the classes and labels of every data set.

    A data set that is empty, or has another number of classes than a head, ends the run before it
    starts, and so do labels that no class has: some label maps (segmentation) or entries
    (classification) of every data set are read for that, evenly spread. While training, every batch
    is looked at before its step. (mmdet's ``NumClassCheckHook`` compares numbers at the first
    training and validation epochs of detectors.) This project's tools add the hook to every config.

    Args:
        on_mismatch (str): ``'error'``, or ``'warn'`` for a model whose heads are meant to differ
            from the data.
        label_maps (int): How many are read of each data set.
        max_seconds (float): After this long, no further ones are read.

    Raises:
        mmvim.utils.UserError: The message names the heads, the numbers and the files.
    """

    priority = 'VERY_HIGH'

    def __init__(
        self, on_mismatch: str = 'error', label_maps: int = 16, max_seconds: float = 10.0
    ) -> None:
        if on_mismatch not in ('error', 'warn'):
            raise ValueError(f"on_mismatch must be 'error' or 'warn', got {on_mismatch!r}")
        self.on_mismatch, self.label_maps, self.max_seconds = on_mismatch, label_maps, max_seconds

    def before_run(self, runner) -> None:
        self.heads = heads_of(runner.model)
        self.ignored = ignored_labels(runner.model)
        for split in ('train', 'val', 'test'):
            loop = getattr(runner, f'_{split}_loop')
            if isinstance(loop, BaseLoop):
                self._check(loop.dataloader.dataset, f'{split}_dataloader')

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if not self.heads or self.on_mismatch == 'warn' or not isinstance(data_batch, dict):
            return
        for sample in data_batch.get('data_samples') or ():
            labels = labels_of(sample)
            if labels is not None:
                outside = labels[(labels >= self.num_classes) | (labels < 0)].unique().tolist()
                ignored = self.ignored if 'gt_sem_seg' in sample else set()
                path = sample.metainfo.get('img_path', 'a sample')
                self._check_labels(set(outside) - ignored, path)

    @property
    def num_classes(self) -> int:
        """Labels must be below this."""
        return min(self.heads.values())

    def _check(self, dataset, loader: str) -> None:
        if len(dataset) == 0:
            raise UserError(
                f'{loader}: the data set is empty ({describe(dataset)}): check ann_file, '
                'data_prefix and filter_cfg'
            )
        classes = getattr(dataset, 'metainfo', {}).get('classes')
        if classes is not None:
            self._check_heads(dataset, loader, tuple(classes))
        for leaf in leaves(dataset) if self.heads else ():
            if hasattr(leaf, 'get_data_info'):
                self._check_label_maps(leaf)
                self._check_entries(leaf)

    def _check_heads(self, dataset, loader: str, classes: tuple[str, ...]) -> None:
        fitting, meta = {len(classes)}, dataset.metainfo
        if 'thing_classes' in meta:  # panoptic: heads of either kind, stuff with one for all things
            stuff = len(meta['stuff_classes'])
            fitting |= {len(meta['thing_classes']), stuff, stuff + 1}
        wrong = {name: count for name, count in self.heads.items() if count not in fitting}
        if wrong:
            heads = ', '.join(f'{name}.num_classes={count}' for name, count in wrong.items())
            names = ', '.join(map(str, classes[:3])) + (', …' if len(classes) > 3 else '')
            self._report(
                f'the model has {heads}, and the data of {loader} {len(classes)} classes ({names}; '
                f'{describe(dataset)}). Set num_classes={len(classes)} in these heads, or '
                'dataset.metainfo.classes to those of the model'
            )

    def _check_label_maps(self, dataset) -> None:
        """Read some of an mmseg data set's label maps as its pipeline does."""
        steps = getattr(getattr(dataset, 'pipeline', None), 'transforms', ())
        load = [step for step in steps if isinstance(step, LoadAnnotations)]
        first = dataset.get_data_info(0)
        if not load or 'reduce_zero_label' not in first or not first.get('seg_map_path'):
            return
        start = time.monotonic()
        for index in spread(len(dataset), self.label_maps):
            if time.monotonic() - start > self.max_seconds:
                break
            info = dataset.get_data_info(index)
            path = info['seg_map_path']
            try:
                content = fileio.get(path, backend_args=load[0].backend_args)
            except FileNotFoundError:
                raise UserError(f'the label map {path} of {info["img_path"]} is missing') from None
            stored = mmcv.imfrombytes(content, 'unchanged', backend=load[0].imdecode_backend)
            if stored.ndim == 3 and stored.shape[2] > 1:
                self._report(
                    f'the label map {path} has {stored.shape[2]} channels; it must have one, with '
                    'the number of its class at each pixel'
                )
                continue
            if stored.max() > 255:
                self._report(f'the label map {path} has labels up to {stored.max()}, above 255')
                continue
            labels = load[0](dict(info, seg_fields=[]))['gt_seg_map']
            outside = set(np.unique(labels[labels >= self.num_classes]).tolist())
            ignored = {getattr(dataset, 'ignore_index', UNLABELLED), *self.ignored}
            self._check_labels(outside - ignored, path)

    def _check_entries(self, dataset) -> None:
        """Look at some of an mmpretrain data set's labels, which are in its list."""
        if 'gt_label' not in dataset.get_data_info(0):
            return
        for index in spread(len(dataset), 1000):
            info = dataset.get_data_info(index)
            labels = np.atleast_1d(np.asarray(info['gt_label']))
            if labels.dtype.kind not in 'iu':  # of several tasks, by name
                return
            outside = labels[(labels >= self.num_classes) | (labels < 0)]
            self._check_labels(set(outside.tolist()), info.get('img_path', f'entry {index}'))

    def _check_labels(self, outside: set[int], path: str) -> None:
        if outside:
            shown = ', '.join(map(str, sorted(outside)[:5])) + (', …' if len(outside) > 5 else '')
            self._report(
                f'{path} has the labels {shown}, and the model has {self.num_classes} classes, 0 '
                f'to {self.num_classes - 1}. (Is 0 "unlabelled"? Set dataset.reduce_zero_label)'
            )

    def _report(self, message: str) -> None:
        if self.on_mismatch == 'error':
            raise UserError(f"{message}. If this is meant: CheckDataHook's on_mismatch='warn'")
        print_log(message, logger='current', level=logging.WARNING)


def heads_of(model: nn.Module) -> dict[str, int]:
    """The parts of a model that tell the data's classes apart: name to ``num_classes``."""
    heads = {}
    for name, module in model.named_modules():
        count = getattr(module, 'num_classes', None)
        name = name.removeprefix('module.')  # of a wrapper
        other = OTHER_PARTS.intersection(name.split('.')) or type(module).__name__ in OTHER_HEADS
        if isinstance(count, int) and count > 0 and not other:
            heads[name] = count
    return heads


def ignored_labels(model: nn.Module) -> set[int]:
    """Labels that the heads' losses pass over, and what stands for unlabelled everywhere."""
    found = {getattr(module, 'ignore_index', None) for module in model.modules()}
    return {UNLABELLED, *(label for label in found if isinstance(label, int))}


def labels_of(sample) -> torch.Tensor | None:
    """Those of a sample for segmentation or classification; a detector's come from the classes."""
    if 'gt_sem_seg' in sample and 'gt_instances' not in sample:
        return sample.gt_sem_seg.data
    return sample.gt_label if 'gt_label' in sample else None


def spread(length: int, count: int) -> list[int]:
    """Up to ``count`` indices from the first to the last."""
    return sorted({round(i) for i in np.linspace(0, length - 1, min(length, count))})
