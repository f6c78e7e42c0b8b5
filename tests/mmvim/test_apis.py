"""Predictions in Python, against those of mmseg's and mmdet's own functions."""

import copy

import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import DefaultScope
from PIL import Image
from tiny_models import DETECTOR, SEGMENTOR, write_checkpoint, write_config

from mmvim.apis import load_model, predict, prediction
from mmvim.datasets.shapes import CLASSES, PALETTE, draw_scene
from mmvim.utils import CheckpointError
from mmvim.utils.launch import UserError


def scene(height: int, width: int, seed: int = 0) -> np.ndarray:
    """An RGB picture of this size."""
    side = max(height, width)
    return draw_scene(np.random.default_rng(seed), side).image[:height, :width, ::-1].copy()


@pytest.fixture(scope='module')
def segmentor_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('segmentor')
    config = write_config(folder / 'config.py', SEGMENTOR)
    return config, write_checkpoint(folder / 'weights.pth', config)


@pytest.fixture(scope='module')
def segmentor(segmentor_files):
    return load_model(*segmentor_files, device='cpu')


@pytest.fixture(scope='module')
def detector(tmp_path_factory):
    folder = tmp_path_factory.mktemp('detector')
    config = write_config(folder / 'config.py', DETECTOR)
    return load_model(config, write_checkpoint(folder / 'weights.pth', config), device='cpu')


def by_mmseg(model, picture: np.ndarray) -> torch.Tensor:
    from mmseg.apis import inference_model

    # It reads the pipeline and changes it.
    before, model.cfg = model.cfg, copy.deepcopy(model.cfg)
    with DefaultScope.overwrite_default_scope('mmseg'):
        result = inference_model(model, np.ascontiguousarray(picture[..., ::-1]))
    model.cfg = before
    return result.pred_sem_seg.data


@pytest.mark.parametrize('size', [(64, 64), (50, 90)])
def test_a_label_map_is_mmsegs_given_bgr(segmentor, size):
    picture = scene(*size)
    (sample,) = predict(segmentor, picture)
    labels = sample.pred_sem_seg.data
    assert labels.shape == (1, *size) and len(labels.unique()) > 1
    assert torch.equal(labels, by_mmseg(segmentor, picture))
    (swapped,) = predict(segmentor, picture[..., ::-1])
    assert not torch.equal(labels, swapped.pred_sem_seg.data)


@pytest.mark.parametrize('at_a_time', [1, 2**26])
def test_a_label_map_is_as_large_as_its_picture(segmentor, monkeypatch, at_a_time):
    # ADE20K's test pipeline makes pictures smaller for the network.
    monkeypatch.setattr(prediction, 'SCORES_AT_A_TIME', at_a_time)
    monkeypatch.setattr(segmentor, 'cfg', copy.deepcopy(segmentor.cfg))
    # The first is what data sets are tested with, the second what mmseg's function takes.
    for steps in (segmentor.cfg.test_dataloader.dataset.pipeline, segmentor.cfg.test_pipeline):
        steps.insert(1, dict(type='Resize', scale=(64, 64), keep_ratio=True))
    picture = scene(150, 211)
    (sample,) = predict(segmentor, picture)
    assert sample.ori_shape == (150, 211) and 'seg_logits' not in sample
    assert torch.equal(sample.pred_sem_seg.data, by_mmseg(segmentor, picture))


def test_sliding_windows_are_mmsegs(segmentor, monkeypatch):
    windows = ConfigDict(mode='slide', crop_size=(64, 64), stride=(40, 40))
    monkeypatch.setattr(segmentor, 'test_cfg', windows)
    picture = scene(80, 100)
    (sample,) = predict(segmentor, picture)
    assert torch.equal(sample.pred_sem_seg.data, by_mmseg(segmentor, picture))


def test_a_picture_in_a_batch_is_predicted_as_if_alone(segmentor, detector):
    sizes = [(64, 64), (64, 64), (48, 64), (64, 64)]
    pictures = [scene(*size, seed) for seed, size in enumerate(sizes)]
    together = predict(segmentor, pictures, batch_size=4)
    for picture, sample in zip(pictures, together, strict=True):
        (alone,) = predict(segmentor, picture)
        assert torch.equal(sample.pred_sem_seg.data, alone.pred_sem_seg.data)
    together = predict(detector, pictures, batch_size=3)
    for picture, sample in zip(pictures, together, strict=True):
        (alone,) = predict(detector, picture)
        torch.testing.assert_close(sample.pred_instances.bboxes, alone.pred_instances.bboxes)
    for wrong, error in ((0, ValueError), (-1, ValueError), (2.0, TypeError)):
        with pytest.raises(error, match='batch_size must be'):
            predict(segmentor, pictures, batch_size=wrong)


def test_files_and_arrays_are_predicted_alike(segmentor, tmp_path):
    picture = scene(40, 64)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(picture).copy()).save(tmp_path / 'turned.png', exif=exif)
    from_file, from_array = predict(segmentor, [tmp_path / 'turned.png', picture])
    assert torch.equal(from_file.pred_sem_seg.data, from_array.pred_sem_seg.data)
    # A path as text is one picture, not a sequence of letters.
    assert len(predict(segmentor, str(tmp_path / 'turned.png'))) == 1


def test_detections_are_mmdets_given_bgr(detector):
    from mmdet.apis import inference_detector

    picture = scene(90, 70)
    (sample,) = predict(detector, picture)
    with DefaultScope.overwrite_default_scope('mmdet'):
        other = inference_detector(detector, np.ascontiguousarray(picture[..., ::-1]))
    assert len(sample.pred_instances) == 10
    for key in ('bboxes', 'scores', 'labels', 'masks'):
        assert torch.equal(sample.pred_instances[key], other.pred_instances[key])
    assert sample.pred_instances.masks.shape == (10, 90, 70)


def test_names_and_colours_come_from_the_checkpoint_or_the_config(segmentor_files, tmp_path):
    config, checkpoint = segmentor_files
    meta = load_model(config, checkpoint, 'cpu').dataset_meta
    assert meta['classes'] == list(CLASSES) and meta['palette'] == [tuple(c) for c in PALETTE]
    own = dict(classes=tuple('abcdefg'), palette=[[k, 0, 0] for k in range(7)])
    path = write_checkpoint(tmp_path / 'own.pth', config, dataset_meta=own)
    meta = load_model(config, path, 'cpu').dataset_meta
    assert meta == dict(classes=list('abcdefg'), palette=[(k, 0, 0) for k in range(7)])


def test_names_that_are_too_few_are_not_used(segmentor_files, tmp_path):
    cfg = Config.fromfile(segmentor_files[0])
    cfg.model.decode_head.num_classes = 9
    cfg.dump(tmp_path / 'config.py')
    checkpoint = write_checkpoint(tmp_path / 'weights.pth', tmp_path / 'config.py')
    meta = load_model(tmp_path / 'config.py', checkpoint, 'cpu').dataset_meta
    assert meta['classes'] == [f'class {k}' for k in range(9)]
    assert len(set(meta['palette'])) == 9


@pytest.mark.parametrize(
    'meta',
    [
        3,
        [1],
        dict(dataset_meta=5),
        dict(dataset_meta=dict(classes=5)),
        dict(dataset_meta=dict(classes=[['a']] * 7, palette=[1] * 7)),
        dict(dataset_meta=dict(palette=[[1, 2]] * 7)),
        dict(dataset_meta=dict(palette=[[300, 0, 0]] * 7)),
        dict(dataset_meta=dict(palette=[['red', 'red', 'red']] * 7)),
    ],
)
def test_names_and_colours_that_are_none_are_not_used(segmentor_files, tmp_path, meta):
    config, checkpoint = segmentor_files
    content = torch.load(checkpoint, weights_only=True)
    torch.save(dict(content, meta=meta), tmp_path / 'odd.pth')
    found = load_model(config, tmp_path / 'odd.pth', 'cpu').dataset_meta
    assert found == dict(classes=list(CLASSES), palette=[tuple(c) for c in PALETTE])


def test_what_is_no_checkpoint_is_told_for_any_backbone(segmentor_files, tmp_path):
    cfg = Config.fromfile(segmentor_files[0])
    cfg.model.backbone = dict(type='ResNet', depth=18, base_channels=8)
    cfg.model.neck = None
    cfg.model.decode_head.in_channels = [8, 16, 32, 64]
    cfg.model.auxiliary_head = None
    for content in ([], 3, dict(state_dict=None), dict(state_dict=[])):
        torch.save(content, tmp_path / 'none.pth')
        with pytest.raises(CheckpointError, match='none.pth holds no weights'):
            load_model(cfg, tmp_path / 'none.pth', 'cpu')


@pytest.mark.parametrize('num_classes', [1, 2])
def test_one_output_channel_tells_two_classes_apart(segmentor_files, tmp_path, num_classes):
    cfg = Config.fromfile(segmentor_files[0])
    binary = dict(num_classes=num_classes, out_channels=1, threshold=0.5)
    cfg.model.decode_head.update(binary)
    cfg.model.auxiliary_head.update(binary)
    cfg.dump(tmp_path / 'config.py')
    checkpoint = write_checkpoint(tmp_path / 'weights.pth', tmp_path / 'config.py')
    model = load_model(tmp_path / 'config.py', checkpoint, 'cpu')
    assert model.dataset_meta['classes'] == ['class 0', 'class 1']
    assert len(model.dataset_meta['palette']) == 2
    (sample,) = predict(model, scene(64, 64))
    assert set(sample.pred_sem_seg.data.unique().tolist()) <= {0, 1}


def test_a_checkpoint_must_fill_the_model(segmentor_files, tmp_path):
    config, checkpoint = segmentor_files
    content = torch.load(checkpoint, weights_only=True)
    weights = content['state_dict']
    auxiliary = {k: v for k, v in weights.items() if not k.startswith('auxiliary_head.')}
    torch.save({'state_dict': auxiliary}, tmp_path / 'enough.pth')
    load_model(config, tmp_path / 'enough.pth', 'cpu')
    headless = {k: v for k, v in auxiliary.items() if 'decode_head.conv_seg' not in k}
    torch.save({'state_dict': headless}, tmp_path / 'headless.pth')
    with pytest.raises(CheckpointError, match='not have all of the model: decode_head.conv_seg'):
        load_model(config, tmp_path / 'headless.pth', 'cpu')
    name = 'decode_head.conv_seg.weight'
    torch.save({'state_dict': dict(weights, **{name: weights[name].char()})}, tmp_path / 'int8.pth')
    with pytest.raises(CheckpointError, match=f'{name} is torch.int8, not torch.float32'):
        load_model(config, tmp_path / 'int8.pth', 'cpu')
    other = dict(weights, **{name: torch.zeros(150, 16, 1, 1)})
    torch.save({'state_dict': other}, tmp_path / 'other.pth')
    with pytest.raises(CheckpointError, match='not one of this config: size mismatch for decode_h'):
        load_model(config, tmp_path / 'other.pth', 'cpu')


def test_what_cannot_be_used_is_named(segmentor_files, segmentor, monkeypatch):
    config, checkpoint = segmentor_files
    with pytest.raises(UserError, match='device nonsense cannot be used'):
        load_model(config, checkpoint, 'nonsense')
    with pytest.raises(UserError, match='default_scope must be one of mmseg, mmdet, mmpretrain'):
        load_model(config, checkpoint, 'cpu', dict(default_scope='mmagic'))
    monkeypatch.setattr(segmentor, 'cfg', copy.deepcopy(segmentor.cfg))
    segmentor.cfg.test_dataloader.dataset.pipeline[0].color_type = 'unchanged'
    with pytest.raises(UserError, match='must begin with LoadImageFromFile'):
        predict(segmentor, scene(64, 64))
