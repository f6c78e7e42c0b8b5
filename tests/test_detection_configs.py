"""Every detection config builds, trains a step, predicts, and says what the recipe says."""

from pathlib import Path

import pytest
import torch
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.utils import import_modules_from_strings

from mmvim.models.simple_feature_pyramid import LayerNorm2d

CONFIGS = Path(__file__).parents[1] / 'configs'
READY = sorted(p for p in CONFIGS.rglob('*rcnn*.py') if '_base_' not in p.parts)
PAPER = 'vim/vim-tiny_cascade-mask-rcnn_8xb8-380k_coco-1024x1024.py'


def load(name: str | Path, size: int | None = None) -> Config:
    """A config; few regions and a small linear layer make it quick. Trained at ``size``."""
    cfg = Config.fromfile(CONFIGS / name)
    stages, heads = cfg.model.train_cfg.rcnn, cfg.model.roi_head.bbox_head
    for stage in stages if isinstance(stages, list) else [stages]:
        stage.sampler.num = 16
    for head in heads if isinstance(heads, list) else [heads]:
        head.fc_out_channels = 32
    cfg.model.test_cfg.rpn.max_per_img = 20
    cfg.model.test_cfg.rcnn.score_thr = 0.0
    if size is not None:
        cfg.model.data_preprocessor.batch_augments = None
        cfg.model.backbone.img_size = size
    return cfg


def build(cfg: Config) -> torch.nn.Module:
    """The model as constructed; initialising the large heads would take longer than the tests."""
    import_modules_from_strings(**cfg.custom_imports)
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    return MODELS.build(cfg.model)


def batch(*shapes: tuple[int, int], boxes: int = 3) -> dict:
    images = [(3, *shape) for shape in shapes]
    return demo_mm_inputs(
        len(shapes), images, num_items=[boxes] * len(shapes), num_classes=6, with_mask=True
    )


def training_loss(model: torch.nn.Module, data: dict) -> torch.Tensor:
    data = model.train().data_preprocessor(data, training=True)
    return model.parse_losses(model(**data, mode='loss'))[0]


def check_step(model: torch.nn.Module, data: dict) -> None:
    """Backpropagate; distributed training waits for a gradient of every parameter that learns."""
    loss = training_loss(model, data)
    loss.backward()
    assert loss.isfinite()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def check_predictions(model: torch.nn.Module, shape: tuple[int, int]) -> None:
    with torch.no_grad():
        (sample,) = model.eval().test_step(batch(shape))
    found = sample.pred_instances
    assert len(found) > 0
    assert found.masks.dtype == torch.bool and len(found.masks) == len(found.bboxes)


def slow_at_full_size(path):
    marks = [pytest.mark.slow] if path.stem.endswith('coco-1024x1024') else []
    return pytest.param(path, id=path.stem, marks=marks)


@pytest.mark.parametrize('path', map(slow_at_full_size, READY))
def test_config_trains_and_predicts(path):
    cfg = load(path, size=64)
    assert {'train_dataloader', 'test_dataloader', 'test_evaluator'} <= set(cfg)
    assert cfg.optim_wrapper.constructor == 'VimOptimWrapperConstructor'
    model = build(cfg)
    data = batch((64, 64))
    data['data_samples'][0].gt_instances.labels.zero_()  # the class that every config has
    check_step(model, data)
    check_predictions(model, (48, 80))


@pytest.mark.slow
def test_the_papers_size_trains_and_predicts():
    model = build(load(PAPER))
    check_step(model, batch((700, 1024)))  # jittered; padded to 1024 x 1024
    check_predictions(model, (1024, 1400))


def test_pictures_without_objects_train():
    """Large-scale jitter crops them all away at times."""
    check_step(build(load(PAPER, size=64)), batch((64, 64), boxes=0))


def test_empty_masks_train():
    data = batch((64, 64))
    data['data_samples'][0].gt_instances.masks.masks[:] = 0
    check_step(build(load(PAPER, size=64)), data)


def test_jittered_images_are_padded_to_the_papers_size_and_tested_ones_are_not():
    preprocessor = build(load(PAPER)).data_preprocessor
    training = preprocessor(batch((600, 1024), (300, 200)), training=True)
    assert training['inputs'].shape == (2, 3, 1024, 1024)
    assert training['data_samples'][1].gt_instances.masks.masks.shape[1:] == (1024, 1024)
    assert preprocessor(batch((1024, 1365)))['inputs'].shape == (1, 3, 1024, 1376)


def test_heads_are_those_of_vitdet():
    model = build(load(PAPER, size=64))
    assert len(model.rpn_head.rpn_conv) == 2
    for head in model.roi_head.bbox_head:
        assert (len(head.shared_convs), len(head.shared_fcs)) == (4, 1)
        assert all(isinstance(conv.norm, LayerNorm2d) for conv in head.shared_convs)
        assert head.reg_class_agnostic
    for head in model.roi_head.mask_head:
        assert all(isinstance(conv.norm, LayerNorm2d) for conv in head.convs)
    strides = [stride for stride, _ in model.rpn_head.prior_generator.strides]
    sizes = [feature.shape[-1] for feature in model.extract_feat(torch.rand(1, 3, 128, 128))]
    assert [128 // size for size in sizes] == strides == [4, 8, 16, 32, 64]


def test_paper_recipe():
    cfg = load(PAPER)
    optimizer, (warm_up, decay) = cfg.optim_wrapper.optimizer, cfg.param_scheduler
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 1e-4, 0.1)
    assert cfg.train_cfg.max_iters == decay.end == 380_000
    assert (warm_up.end, decay.begin, decay.power, decay.eta_min) == (250, 250, 1.0, 0.0)
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == 64
    assert cfg.model.backbone == dict(
        type='VisionMamba', arch='tiny', img_size=1024, cls_token=None
    )
    jitter, crop = cfg.train_dataloader.dataset.pipeline[3:5]
    assert (jitter.scale, jitter.ratio_range) == ((1024, 1024), (0.1, 2.0))
    assert crop.crop_size == (1024, 1024)
    resize = cfg.test_dataloader.dataset.pipeline[1]
    assert resize == dict(type='ResizeShortestEdge', scale=1024)  # no limit to the longer side


def test_official_recipe():
    cfg = load('vim/vim-tiny_cascade-mask-rcnn_8xb8-100e_coco-1024x1024.py')
    assert cfg.optim_wrapper.paramwise_cfg.layer_decay_rate == 0.837
    assert cfg.train_cfg.max_iters == cfg.param_scheduler[1].end == 184_375
    assert abs(cfg.train_cfg.max_iters * 64 / 118_000 - 100) < 1  # epochs
    backbone = cfg.model.backbone
    assert backbone.rope and backbone.rope_residual and backbone.rope_grid == 14


@pytest.mark.parametrize('name', ['tiny', 'small'])
@pytest.mark.parametrize('attention', ['', '-global'])
def test_deit_differs_from_vim_in_the_backbone_only(name, attention):
    tail = '8xb8-380k_coco-1024x1024.py'
    vim = load(f'vim/vim-{name}_cascade-mask-rcnn_{tail}')
    deit = load(f'deit/deit-{name}_cascade-mask-rcnn{attention}_{tail}')
    vim_backbone, backbone = vim.model.pop('backbone'), deit.model.pop('backbone')
    for key in ('model', 'optim_wrapper', 'param_scheduler', 'train_dataloader', 'train_cfg'):
        assert vim[key] == deit[key]
    assert backbone.arch == vim_backbone.arch
    windows = dict(window_size=14, global_indices=(2, 5, 8, 11))
    expected = dict(window_size=None, global_indices=None) if attention else windows
    assert {key: backbone[key] for key in expected} == expected
