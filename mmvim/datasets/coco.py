"""COCO's instances and their metric, with the annotation file checked and mended."""

import logging
import os
from pathlib import Path

from mmdet.datasets import CocoDataset
from mmdet.evaluation import CocoMetric
from mmdet.registry import DATASETS, METRICS
from mmengine.fileio import get_local_path
from mmengine.logging import print_log

from mmvim.utils.data import is_local
from mmvim.utils.errors import UserError

from .coco_file import CheckedCoco


@DATASETS.register_module()
class CheckedCocoDataset(CocoDataset):
    """mmdet's :class:`CocoDataset` that finds out before training what would spoil it later.

    The annotation file is mended where that is safe, see :class:`CheckedCoco`. One that names
    images which are not there, lacks a class (mmdet would number the others wrongly), or leaves no
    image to train on, is refused. Instances without a mask, or with no polygon of three corners,
    are counted in a warning; where masks are trained, they are ignored as crowds are. Boxes without
    area are left out, as mmdet does.

    Arguments are those of :class:`mmdet.datasets.CocoDataset`.

    Raises:
        UserError: Images, classes or annotations are missing or unusable; the message names the
            file and counts them.
    """

    COCOAPI = CheckedCoco

    def load_data_list(self) -> list[dict]:
        data_list = super().load_data_list()
        pipeline = (getattr(step, 'backend_args', None) for step in self.pipeline.transforms)
        if is_local(self.backend_args, *pipeline) and '://' not in self.data_prefix['img']:
            self._check_images(data_list)
        self._check_masks(data_list)
        return data_list

    def filter_data(self) -> list[dict]:
        data_list = super().filter_data()
        if not data_list:
            raise UserError(
                f'{self.ann_file}: none of its {len(self.data_list)} images can be used, as they '
                'have no object of the classes or are smaller than filter_cfg.min_size'
            )
        return data_list

    def _check_masks(self, data_list: list[dict]) -> None:
        """Count the instances without a mask, and give them one that mmdet can pass over."""
        without_mask = 0
        for instance in (i for data in data_list for i in data['instances']):
            if not instance.get('mask'):
                instance['mask'] = []  # mmdet ignores these, but fails without the key
            if isinstance(instance['mask'], list):
                without_mask += all(len(polygon) < 6 for polygon in instance['mask'])
        if without_mask:
            consequence = 'are ignored where masks are trained'
            if self.test_mode:
                consequence = "end the evaluation of masks: remove them or set metric='bbox'"
            print_log(
                f'{self.ann_file}: {without_mask} instances have no mask and {consequence}',
                logger='current',
                level=logging.WARNING,
            )

    def _check_images(self, data_list: list[dict]) -> None:
        """Compare file names with folder listings, one per folder: quick on network disks, too."""
        paths = [Path(data['img_path']) for data in data_list]
        there = {
            folder: set(os.listdir(folder)) if folder.is_dir() else set()
            for folder in {path.parent for path in paths}
        }
        missing = [str(path) for path in paths if path.name not in there[path.parent]]
        if missing:
            raise UserError(
                f'{self.ann_file} names {len(missing)} of {len(paths)} images that do not exist: '
                f'{", ".join(missing[:3])}{", …" if len(missing) > 3 else ""}. '
                'Are the images of this split unpacked (docs/data.md)?'
            )


@METRICS.register_module()
class CheckedCocoMetric(CocoMetric):
    """mmdet's :class:`CocoMetric` on an annotation file that :class:`CheckedCoco` has mended.

    Arguments are those of :class:`mmdet.evaluation.CocoMetric`.

    Raises:
        UserError: The file is unusable, has no annotations (unless ``format_only``), or has not the
            classes of the data set.
    """

    def __init__(
        self, ann_file: str | None = None, *, sort_categories: bool = False, **kwargs
    ) -> None:
        super().__init__(**kwargs)
        if ann_file is None:
            return
        with get_local_path(ann_file, backend_args=self.backend_args) as path:
            self._coco_api = CheckedCoco(path)
        if not (self._coco_api.anns or self.format_only):
            raise UserError(f'{ann_file} has no annotations, so that nothing can be evaluated')
        if sort_categories:
            self._coco_api.dataset['categories'].sort(key=lambda category: category['id'])
            self._coco_api.cats = dict(sorted(self._coco_api.cats.items()))

    @property
    def dataset_meta(self) -> dict | None:
        return self._dataset_meta

    @dataset_meta.setter
    def dataset_meta(self, dataset_meta: dict) -> None:
        """Set when the evaluation loop is built: wrong classes end a training at its start."""
        if self._coco_api is not None and dataset_meta.get('classes'):
            self._coco_api.get_cat_ids(cat_names=dataset_meta['classes'])
        self._dataset_meta = dataset_meta
