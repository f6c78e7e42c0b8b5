"""What is compared: data sets, backbones and the settings that tell the sides apart."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from mmvim.models.directions import DIRECTIONS
from mmvim.utils.errors import UserError

__all__ = ['SIDES', 'TASKS', 'Side', 'Task']


@dataclass(frozen=True)
class Side:
    """One of the backbones that are compared.

    Args:
        family (str): ``'vim'`` or ``'deit'``, the folder and the first word of its configs.
        options (tuple[str, ...]): Settings of the config that it changes.
        tasks (tuple[str, ...], optional): The tasks that have it; all if None.
    """

    family: str
    options: tuple[str, ...] = ()
    tasks: tuple[str, ...] | None = None


def design(*options: str) -> Side:
    """One of the paper's designs of classification (its Table 5)."""
    return Side('vim', tuple(f'model.{option}' for option in options), ('imagenette',))


SIDES = {
    'vim': Side('vim'),
    'deit': Side('deit'),
    **{f'vim-{name}': Side('vim', (f'model.backbone.directions={name}',)) for name in DIRECTIONS},
    'vim-mean-pool': design('backbone.cls_token=None', 'backbone.out_type=avg_featmap'),
    'vim-max-pool': design(
        'backbone.cls_token=None',
        'backbone.out_type=raw',
        'head.type=mmvim.models.max_pool_head.MaxPoolClsHead',
    ),
    'vim-head-token': design('backbone.cls_token=head'),
    'vim-double-token': design('backbone.cls_token=double'),
    'vim-middle-token': design('backbone.cls_token=middle'),
}


@dataclass(frozen=True)
class Task:
    """A data set with a standard test split.

    Args:
        data (str): Where its configs look for it.
        config (str): Pattern of its configs in the folder of a backbone.
        metrics (dict[str, tuple[str, float]]): Key in the log of a test: its name, and the factor
            to percent. The first one is the result.
        evaluators (dict[str, str]): Evaluator: the annotation file that it reads itself.
        images (str): The images of a split: a pattern, or an annotation file in COCO's format and
            the folder of its images, separated by a space.
        label_maps (str, optional): Folder of their label maps, in segmentation.
        validation (tuple[str, ...]): Settings with which the validation split is tested on; none
            where there is no such split beside that for testing.
    """

    name: str
    data: str
    config: str
    metrics: dict[str, tuple[str, float]]
    evaluators: dict[str, str]
    images: str
    label_maps: str | None = None
    validation: tuple[str, ...] = ()

    def sides(self) -> list[str]:
        """Names of the sides that this task has."""
        return [name for name, side in SIDES.items() if self.name in (side.tasks or [self.name])]

    def config_of(self, side: str, arch: str, configs: Path) -> Path:
        """The one config of a side.

        Raises:
            UserError: There is none of this size.
        """
        family = SIDES[side].family
        found = sorted((configs / family).glob(self.config.format(family=family, arch=arch)))
        if len(found) != 1:
            raise UserError(
                f'{self.name} has {len(found)} configs for {family} of arch {arch!r} in {configs}'
            )
        return found[0]

    def data_options(self, data: Path, split: str) -> list[str]:
        """Settings that say where the data set is and which split is tested on.

        Raises:
            UserError: The data set has no such split.
        """
        if split == 'val' and not self.validation:
            raise UserError(
                f'--split val: {self.name} has no validation split beside the test split'
            )
        options = [
            f'{part}_dataloader.dataset.data_root={data}' for part in ('train', 'val', 'test')
        ]
        files = self.evaluators.items()
        options += [f'{part}_evaluator.ann_file={data / file}' for part, file in files]
        return options + (list(self.validation) if split == 'val' else [])

    def images_of(self, data: Path, split: str) -> list[Path]:
        """The images of a split, by name."""
        file, _, folder = self.images.format(split=split).partition(' ')
        if not folder:
            return sorted(data.glob(file))
        listed = json.loads((data / file).read_text())['images']
        return sorted(data / folder / image['file_name'] for image in listed)


TASKS = {
    task.name: task
    for task in (
        Task(
            name='camvid',
            data='data/camvid',
            config='{family}-{arch}_upernet_*_camvid-*.py',
            metrics={'mIoU': ('mIoU', 1), 'mAcc': ('mAcc', 1), 'aAcc': ('aAcc', 1)},
            evaluators={},
            images='images/{split}/*.jpg',
            label_maps='annotations/{split}',
            validation=(
                'test_dataloader.dataset.data_prefix.img_path=images/val',
                'test_dataloader.dataset.data_prefix.seg_map_path=annotations/val',
            ),
        ),
        Task(
            name='pennfudan',
            data='data/pennfudan',
            config='{family}-{arch}_cascade-mask-rcnn_*_pennfudan-*.py',
            metrics={'coco/bbox_mAP': ('box AP', 100), 'coco/segm_mAP': ('mask AP', 100)},
            evaluators=dict.fromkeys(('val', 'test'), 'annotations/instances_test.json'),
            images='annotations/instances_test.json images',
        ),
        Task(
            name='imagenette',
            data='data/imagenette',
            config='{family}-{arch}_*_imagenette-*.py',
            metrics={'accuracy/top1': ('top-1', 1)},
            evaluators={},
            images='val/*/*',
        ),
    )
}
