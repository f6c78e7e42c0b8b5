"""Official classifier weights go into whole models through ``load_from``."""

import logging
import math
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS
from mmengine.runner import Runner
from tiny_models import SEGMENTOR, write_checkpoint, write_config

import mmvim  # noqa: F401  (registers the models)
from mmvim import VisionMamba
from mmvim.utils import CheckpointError

CONFIGS = Path(__file__).parents[2] / 'configs'


def save_official(path: Path, **arguments) -> dict[str, torch.Tensor]:
    """A classifier's file in official format: middle class token, 197 rows, 1000 classes."""
    torch.manual_seed(0)
    model = VisionMamba(**{'arch': 'tiny', 'img_size': 224, 'cls_token': 'middle', **arguments})
    weights = dict(model.state_dict())  # nothing said of the grid
    weights['head.weight'] = torch.rand(1000, model.embed_dims)
    weights['head.bias'] = torch.rand(1000)
    torch.save({'model': weights}, path)
    return weights


@pytest.fixture(scope='module')
def official(tmp_path_factory) -> tuple[str, dict[str, torch.Tensor]]:
    path = tmp_path_factory.mktemp('official') / 'vim_t_midclstok.pth'
    weights = save_official(path)
    assert weights['pos_embed'].shape == (1, 197, 192)
    return str(path), weights


def upernet() -> Config:
    return Config.fromfile(CONFIGS / 'vim/vim-tiny_upernet_8xb2-160k_ade20k-512x512.py')


def cascade_mask_rcnn() -> Config:
    """ViTDet style: one map at 1024² and a simple feature pyramid."""
    cfg = get_config('mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py')
    cfg.default_scope = 'mmdet'
    cfg.model.backbone = dict(type='VisionMamba', arch='tiny', img_size=1024, cls_token=None)
    cfg.model.neck = dict(
        type='SimpleFeaturePyramid', in_channels=192, out_channels=256, num_outs=5
    )
    return cfg


def load(
    cfg: Config, checkpoint: str, tmp_path: Path, resume: bool = False, hooks: tuple = ()
) -> tuple:
    """A runner's model after loading, and what the log says of our hook."""
    lines = []

    class Listener(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    runner = Runner(
        cfg.model,
        str(tmp_path),
        load_from=checkpoint,
        resume=resume,
        custom_hooks=[dict(type=name) for name in ('FitCheckpointHook', *hooks)],
        default_scope=cfg.default_scope,
        experiment_name=f'{tmp_path.name}-{cfg.default_scope}',
    )
    listener = Listener()
    MMLogger.get_current_instance().addHandler(listener)
    runner.load_or_resume()
    MMLogger.get_current_instance().removeHandler(listener)
    return runner.model, [line for line in lines if line.startswith('VisionMamba')]


@pytest.mark.parametrize(('config', 'rows'), [(upernet, 32 * 32), (cascade_mask_rcnn, 64 * 64)])
def test_classifier_goes_into_a_dense_model(config, rows, official, tmp_path):
    path, weights = official
    model, log = load(config(), path, tmp_path)
    state = model.backbone.state_dict()
    assert state['pos_embed'].shape == (1, rows, 192)
    others = [key for key in state if key != 'pos_embed']
    assert len(others) == len(weights) - 4  # pos_embed, cls_token, head.weight, head.bias
    assert all(torch.equal(state[key], weights[key]) for key in others)
    (line,) = log
    assert f'took {len(state)} entries of {path}' in line
    assert 'names translated to backbone.*;' in line
    side = math.isqrt(rows)
    assert 'pos_embed taken for 14 × 14 patches, as the file does not say' in line
    change = f'pos_embed 197 → {rows} rows (14 × 14 → {side} × {side})'
    assert f'{change}; ignored head.weight, head.bias, cls_token' in line


def test_wrong_arch_and_damage_are_errors(official, tmp_path):
    cfg = upernet()
    cfg.model.backbone.arch = 'small'
    with pytest.raises(CheckpointError, match="holds arch 'tiny' .*but the model is arch 'small'"):
        load(cfg, official[0], tmp_path)

    weights = dict(official[1])
    for block in range(7):
        del weights[f'layers.{block}.mixer.A_b_log']
    weights['layers.0.mixer.D'] = torch.rand(3)
    weights['surprise'] = torch.rand(1)
    torch.save({'model': weights}, tmp_path / 'damaged.pth')
    message = (
        '7 missing: layers.0.mixer.A_b_log, .*…; 1 left over: surprise; '
        r'1 of another shape: layers.0.mixer.D \(3,\) for \(384,\)'
    )
    with pytest.raises(CheckpointError, match=message):
        load(upernet(), str(tmp_path / 'damaged.pth'), tmp_path)


def test_own_segmentors_are_checked_too(official, tmp_path):
    cfg = upernet()
    cfg.model.backbone.arch = 'small'
    entries = {f'backbone.{key}': value for key, value in official[1].items()}
    torch.save({'state_dict': entries, 'meta': {}}, tmp_path / 'iter_1.pth')
    with pytest.raises(CheckpointError, match="holds arch 'tiny'"):
        load(cfg, str(tmp_path / 'iter_1.pth'), tmp_path)


def test_a_neck_of_another_kind_is_left_out(tmp_path):
    config = write_config(tmp_path / 'config.py', SEGMENTOR)
    path = write_checkpoint(tmp_path / 'other.pth', config)
    content = torch.load(path, weights_only=True)
    weights, name = content['state_dict'], 'backbone.layers.0.mixer.D'
    weights[name].fill_(7)
    for key in weights:
        if key.startswith('neck.'):
            weights[key] = torch.zeros(*weights[key].shape, 2)
    torch.save(content, path)
    model, _ = load(Config.fromfile(config), str(path), tmp_path)
    assert (model.state_dict()[name] == 7).all()


def test_weights_alone_cannot_be_resumed(official, tmp_path):
    with pytest.raises(CheckpointError, match='no state of a training.*load_from'):
        load(upernet(), official[0], tmp_path, resume=True)


def test_other_backbones_are_left_alone(official, tmp_path):
    cfg = Config(dict(default_scope='mmdet', model=dict(type='ResNet', depth=18)))
    torch.save({'state_dict': {'conv1.weight': torch.ones(64, 3, 7, 7)}}, tmp_path / 'resnet.pth')
    model, log = load(cfg, str(tmp_path / 'resnet.pth'), tmp_path)
    assert model.conv1.weight.eq(1).all() and log == []


@pytest.fixture(scope='module')
def segmentor(tmp_path_factory) -> tuple[Config, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp('segmentor')
    config = write_config(folder / 'config.py', SEGMENTOR)
    path = write_checkpoint(folder / 'weights.pth', config)
    return Config.fromfile(config), torch.load(path, weights_only=True)['state_dict']


def fill(cfg: Config, weights: dict, tmp_path: Path) -> dict[str, torch.Tensor]:
    """The state of a model into which these weights were loaded to test it."""
    torch.save({'state_dict': weights, 'meta': {}}, tmp_path / 'weights.pth')
    model, _ = load(cfg, str(tmp_path / 'weights.pth'), tmp_path, hooks=('FillModelHook',))
    return model.state_dict()


@pytest.mark.parametrize(
    'change, reason',
    [
        (
            lambda k, v: None if k.startswith('decode_head.') else v,
            r'not have all of the model: decode_head.conv_seg.weight, .* more would stay .*config',
        ),
        (
            lambda k, v: None if k == 'decode_head.fpn_bottleneck.bn.running_mean' else v,
            'not have all of the model: decode_head.fpn_bottleneck.bn.running_mean would stay',
        ),
        (
            lambda k, v: torch.zeros(150) if k == 'decode_head.conv_seg.bias' else v,
            r'weights.pth is not one of this config: size mismatch for decode_head.conv_seg.bias',
        ),
    ],
)
def test_what_would_be_tested_as_it_was_initialised_is_refused(segmentor, tmp_path, change, reason):
    cfg, weights = segmentor
    changed = {k: change(k, v) for k, v in weights.items() if change(k, v) is not None}
    with pytest.raises(CheckpointError, match=reason):
        fill(cfg, changed, tmp_path)
    torch.save({'state_dict': changed, 'meta': {}}, tmp_path / 'changed.pth')
    load(cfg, str(tmp_path / 'changed.pth'), tmp_path)  # to train from it


def test_what_has_no_say_in_predictions_may_be_missing(segmentor, tmp_path):
    cfg, weights = segmentor
    kept = {
        f'module.{key}': torch.full_like(value, 3)
        for key, value in weights.items()
        if not key.startswith('auxiliary_head.') and 'num_batches_tracked' not in key
    }
    state = fill(cfg, {**kept, 'module.other_head.weight': torch.ones(2)}, tmp_path)
    assert all((state[key.removeprefix('module.')] == 3).all() for key in kept)


def test_relative_positions_that_start_at_zero_may_be_missing(tmp_path):
    arch = dict(embed_dims=16, depth=1, num_heads=2)
    plain = dict(type='DeiT', arch=arch, img_size=32, patch_size=8, cls_token=None)
    weights = MODELS.build(plain).state_dict()
    cfg = Config(dict(default_scope='mmseg', model=dict(plain, rel_pos=True)))
    added = [value for key, value in fill(cfg, weights, tmp_path).items() if key not in weights]
    assert len(added) == 2 and not any(value.any() for value in added)


def test_test_time_augmentation_needs_all_weights_of_the_model_inside(segmentor, tmp_path):
    cfg, weights = segmentor
    cfg = Config(dict(default_scope='mmseg', model=dict(type='SegTTAModel', module=cfg.model)))
    assert fill(cfg, weights, tmp_path).keys() == {f'module.{key}' for key in weights}
    del weights['decode_head.conv_seg.bias']
    with pytest.raises(CheckpointError, match='not have all of the model: decode_head.conv_seg.b'):
        fill(cfg, weights, tmp_path)


def test_other_backbones_must_be_whole_too(tmp_path):
    cfg = Config(dict(default_scope='mmdet', model=dict(type='ResNet', depth=18)))
    with pytest.raises(CheckpointError, match='not have all of the model: bn1.weight, bn1.bias'):
        fill(cfg, {'conv1.weight': torch.ones(64, 3, 7, 7)}, tmp_path)
