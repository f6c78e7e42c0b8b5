"""Heads and labels that do not fit the data end a run before its first step."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.dataset import BaseDataset
from mmengine.model import BaseModel
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch import nn

from mmvim.datasets.shapes import CLASSES, write_ade20k, write_coco
from mmvim.engine.check_data import heads_of, spread
from mmvim.utils.errors import UserError


class Head(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes, self.ignore_index = num_classes, 255
        self.weight = nn.Parameter(torch.zeros(()))


class Segmentor(BaseModel):
    """Heads that count, and steps that are counted."""

    def __init__(self, **num_classes: int) -> None:
        super().__init__()
        for name, number in num_classes.items():
            self.add_module(name, Head(number))
        self.steps = 0

    def forward(self, inputs, data_samples, mode='tensor'):
        self.steps += 1
        if mode == 'predict':
            return data_samples
        return {'loss': sum(parameter for parameter in self.parameters())}


@pytest.fixture
def root(tmp_path) -> Path:
    write_ade20k(tmp_path / 'shapes', train=3, val=2, size=32)
    return tmp_path / 'shapes'


def loader(root: Path, split: str, **dataset) -> dict:
    pipeline = [dict(type=name) for name in ('LoadImageFromFile', 'LoadAnnotations')]
    return dict(
        batch_size=1,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dict(
            type='ShapesDataset',
            data_root=str(root),
            data_prefix=dict(img_path=f'images/{split}', seg_map_path=f'annotations/{split}'),
            pipeline=[*pipeline, dict(type='PackSegInputs')],
        )
        | dataset,
    )


def runner(root: Path, model: BaseModel, hook: dict | None = None, **dataset) -> Runner:
    init_default_scope('mmseg')
    return Runner(
        model,
        str(root / 'work'),
        train_dataloader=loader(root, 'training', **dataset),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        test_dataloader=loader(root, 'validation', **dataset),
        test_cfg=dict(),
        test_evaluator=dict(type='DumpResults', out_file_path=str(root / 'out.pkl')),
        custom_hooks=[dict(type='CheckDataHook', **(hook or {}))],
        default_scope='mmseg',
        experiment_name=root.parent.name,
    )


def relabel(path: Path, value: int) -> None:
    labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    labels[:2] = value
    cv2.imwrite(str(path), labels)


def label_maps(root: Path, split: str) -> list[Path]:
    return sorted((root / 'annotations' / split).glob('*.png'))


def test_a_model_that_fits_trains_and_tests(root):
    model = Segmentor(decode_head=len(CLASSES), auxiliary_head=len(CLASSES), rpn_head=1)
    runner(root, model).train()
    assert model.steps == 3


@pytest.mark.parametrize('run', ['train', 'test'])
def test_every_head_that_differs_is_named_with_numbers_and_files(root, run):
    model = Segmentor(decode_head=150, auxiliary_head=19, other_head=len(CLASSES))
    message = (
        rf'decode_head.num_classes=150, auxiliary_head.num_classes=19, and the data of {run}_data'
        rf'loader {len(CLASSES)} classes .*{CLASSES[0]}.*ShapesDataset.*annotations/.*num_classes='
    )
    with pytest.raises(UserError, match=message):
        getattr(runner(root, model), run)()
    assert model.steps == 0


def test_a_warning_on_request(root):
    model = Segmentor(decode_head=150)
    runner(root, model, hook=dict(on_mismatch='warn')).train()
    assert model.steps == 3
    with pytest.raises(ValueError, match="on_mismatch must be 'error' or 'warn', got 'no'"):
        runner(root, model, hook=dict(on_mismatch='no'))


@pytest.mark.parametrize('run', ['train', 'test'])
def test_labels_that_no_class_has_are_found_before_the_start(root, run):
    path = label_maps(root, 'training' if run == 'train' else 'validation')[-1]
    relabel(path, len(CLASSES) + 2)  # 0 is unlabelled: this is label 8 of 0 … 6
    model = Segmentor(decode_head=len(CLASSES))
    with pytest.raises(
        UserError, match=rf'{path.name} has the labels 8, and the model has 7 classes'
    ):
        getattr(runner(root, model), run)()
    assert model.steps == 0


def test_every_batch_is_looked_at_before_its_step(root):
    path = label_maps(root, 'training')[1]  # the hook reads the first only
    relabel(path, len(CLASSES) + 2)
    model = Segmentor(decode_head=len(CLASSES))
    with pytest.raises(UserError, match=rf'{path.stem}.jpg has the labels 8'):
        runner(root, model, hook=dict(label_maps=1)).train()
    assert model.steps == 1


def test_labels_count_without_class_names_too(root):
    plain = dict(type='BaseSegDataset', img_suffix='.jpg', seg_map_suffix='.png')
    with pytest.raises(UserError, match='has the labels 7'):  # 0 is a class here
        runner(root, Segmentor(decode_head=len(CLASSES)), **plain).train()
    runner(root, Segmentor(decode_head=len(CLASSES) + 1), **plain).train()


@pytest.mark.parametrize(
    ('labels', 'message'),
    [
        (np.full((32, 32), 300, np.uint16), 'has labels up to 300, above 255'),
        (np.zeros((32, 32, 3), np.uint8), 'has 3 channels; it must have one'),
        (None, 'is missing'),
    ],
)
def test_label_maps_of_another_kind_are_refused(root, labels, message):
    path = label_maps(root, 'training')[0]
    path.unlink()
    if labels is not None:
        cv2.imwrite(str(path), labels)
    with pytest.raises(UserError, match=rf'{path.name}.* {message}'):
        runner(root, Segmentor(decode_head=len(CLASSES))).train()


def test_an_empty_data_set_is_named(root):
    with pytest.raises(
        UserError, match=r'train_dataloader: the data set is empty .*images/training'
    ):
        runner(root, Segmentor(decode_head=7), img_suffix='.tif', serialize_data=False).train()


def test_data_sets_inside_of_wrappers_are_read(root):
    path = label_maps(root, 'training')[0]
    relabel(path, 100)
    dataset = loader(root, 'training')['dataset']
    both = dict(
        type='ConcatDataset', datasets=[dict(type='RepeatDataset', times=2, dataset=dataset)]
    )
    cfg = runner(root, Segmentor(decode_head=7))
    cfg._train_dataloader = dict(loader(root, 'training'), dataset=both)
    with pytest.raises(UserError, match=rf'{path.name} has the labels 99'):
        cfg.train()


def test_detectors_are_compared_as_well(tmp_path):
    write_coco(tmp_path / 'shapes', train=2, val=1, size=32)
    init_default_scope('mmdet')
    dataset = dict(
        type='mmdet.CocoDataset',
        data_root=str(tmp_path / 'shapes'),
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='train'),
        metainfo=dict(classes=CLASSES[1:]),
    )
    model = Segmentor(rpn_head=1, bbox_head=80, mask_head=len(CLASSES) - 1)
    with pytest.raises(UserError, match=r'has bbox_head.num_classes=80, .*6 classes.*CocoDataset'):
        runner(tmp_path, model, **dataset).train()


class Entries(BaseDataset):
    """Labels in a list, as mmpretrain's data sets have them; ``read`` is what samples get."""

    METAINFO = dict(classes=('disc', 'ring'))

    def load_data_list(self) -> list[dict]:
        return self.ann_file

    def _join_prefix(self) -> None:
        pass

    def prepare_data(self, index: int) -> dict:
        sample = BaseDataElement(metainfo=dict(img_path=self.get_data_info(index)['img_path']))
        sample.gt_label = torch.tensor([self.read.get(index, 0)])
        return dict(inputs=torch.zeros(1), data_samples=sample)


def classifier_runner(tmp_path, model, labels: list, read: dict | None = None) -> Runner:
    entries = [dict(img_path=f'{i}.png', gt_label=label) for i, label in enumerate(labels)]
    data = Entries(ann_file=entries)
    data.read = read or {}
    sampler = dict(type='DefaultSampler', shuffle=False)
    return Runner(
        model,
        str(tmp_path),
        train_dataloader=dict(batch_size=1, dataset=data, sampler=sampler),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        custom_hooks=[dict(type='CheckDataHook')],
        experiment_name=tmp_path.name,
    )


def test_classifiers_are_compared_as_well(tmp_path):
    model = Segmentor(head=2)
    classifier_runner(tmp_path, model, [0, 1, [0, 1]]).train()
    assert model.steps == 3
    with pytest.raises(UserError, match=r'head.num_classes=1000, .* 2 classes \(disc, ring'):
        classifier_runner(tmp_path, Segmentor(head=1000), [0, 1]).train()
    for wrong in (2, -1, 255, [0, 2]):
        with pytest.raises(UserError, match=r'2.png has the labels (2|-1|255), .*2 classes'):
            classifier_runner(tmp_path, model, [0, 1, wrong]).train()
    assert model.steps == 3
    with pytest.raises(UserError, match=r'1.png has the labels 7'):
        classifier_runner(tmp_path, model, [0, 1, 1], read={1: 7}).train()
    assert model.steps == 4


def test_parts_with_classes_of_their_own_are_passed_over():
    model = nn.ModuleDict(
        dict(
            backbone=Head(1000),
            rpn_head=Head(1),
            roi_head=nn.ModuleDict(dict(bbox_head=Head(80), semantic_head=Head(183))),
        )
    )
    wrapped = nn.ModuleDict(dict(module=model))
    assert heads_of(wrapped) == heads_of(model) == {'roi_head.bbox_head': 80}


def test_samples_are_spread_from_first_to_last():
    assert spread(3, 16) == [0, 1, 2]
    assert spread(1000, 3) == [0, 500, 999]
