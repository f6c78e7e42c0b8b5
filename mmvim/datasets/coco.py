"""COCO's instances, with the annotation file checked against the images."""

import logging
import os
from pathlib import Path

from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS
from mmengine.logging import print_log

from mmvim.utils.launch import UserError


@DATASETS.register_module()
class CheckedCocoDataset(CocoDataset):
    """mmdet's :class:`CocoDataset` that finds out before training what would end it later.

    An annotation file that names images which are not there, or lacks a class (mmdet would number
    the others wrongly), is refused. Instances without a mask, or with no polygon of three corners,
    are counted in a warning; where masks are trained, they are ignored as crowds are. Boxes without
    area are left out, as mmdet does.

    Arguments are those of :class:`mmdet.datasets.CocoDataset`.

    Raises:
        UserError: Images or classes are missing; the message counts them.
    """

    def load_data_list(self) -> list[dict]:
        data_list = super().load_data_list()
        classes = self.metainfo['classes']
        if len(self.cat_ids) != len(classes):
            raise UserError(
                f'{self.ann_file} has {len(self.cat_ids)} of the {len(classes)} classes '
                f'({", ".join(classes[:3])}, …): name those it has in dataset.metainfo.classes'
            )
        if self.backend_args is None and '://' not in (self.data_prefix.get('img') or ''):
            self._check_images(data_list)
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
        return data_list

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
