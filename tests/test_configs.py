"""Every config loads, its model builds, and it says what the recipe says."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.utils import import_modules_from_strings

CONFIGS = Path(__file__).parents[1] / 'configs'
# Those of mmdet are tested in test_detection_configs.py, those of mmpretrain in tests/cls.
SEGMENTATION = sorted(
    p
    for p in CONFIGS.rglob('*.py')
    if '_base_' not in p.parts
    and not any(word in p.stem for word in ('rcnn', '_in1k', 'imagenette'))
)


def load(name: str) -> Config:
    return Config.fromfile(CONFIGS / name)


def build(cfg: Config):
    from mmengine.registry import MODELS

    import_modules_from_strings(**cfg.custom_imports)
    init_default_scope(cfg.default_scope)
    return MODELS.build(cfg.model)


@pytest.mark.parametrize('path', SEGMENTATION, ids=lambda p: p.stem)
def test_config_loads_and_its_model_builds(path):
    cfg = Config.fromfile(path)
    model = build(cfg)
    assert sum(parameter.numel() for parameter in model.parameters()) > 0
    assert {'train_dataloader', 'test_dataloader', 'test_evaluator'} <= set(cfg)
    assert cfg.optim_wrapper.constructor == 'VimOptimWrapperConstructor'


def test_paper_recipe():
    cfg = load('vim/vim-tiny_upernet_8xb2-160k_ade20k-512x512.py')
    optimizer, (warm_up, decay) = cfg.optim_wrapper.optimizer, cfg.param_scheduler
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 6e-5, 0.01)
    assert cfg.train_cfg.max_iters == decay.end == 160_000
    assert (warm_up.end, decay.begin, decay.power, decay.eta_min) == (1500, 1500, 1.0, 0.0)
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == 16
    assert cfg.model.test_cfg.mode == 'whole'


def test_official_recipe():
    cfg = load('vim/vim-small_upernet_4xb8-60k_ade20k-512x512.py')
    assert cfg.optim_wrapper.paramwise_cfg.layer_decay_rate == 0.92
    assert (cfg.optim_wrapper.optimizer.lr, cfg.optim_wrapper.optimizer.weight_decay) == (2e-4, 0.1)
    assert cfg.train_cfg.max_iters == cfg.param_scheduler[1].end == 60_000
    assert cfg.train_dataloader.batch_size * 4 == cfg.auto_scale_lr.base_batch_size == 32
    assert cfg.model.test_cfg == dict(mode='slide', crop_size=(512, 512), stride=(341, 341))
    assert cfg.model.backbone.out_indices == (5, 11, 17, 23)


@pytest.mark.parametrize('name', ['tiny', 'small'])
def test_deit_differs_from_vim_in_the_backbone_only(name):
    vim = load(f'vim/vim-{name}_upernet_8xb2-160k_ade20k-512x512.py')
    deit = load(f'deit/deit-{name}_upernet_8xb2-160k_ade20k-512x512.py')
    for key in ('neck', 'decode_head', 'auxiliary_head', 'test_cfg'):
        assert vim.model[key] == deit.model[key]
    for key in ('optim_wrapper', 'param_scheduler', 'train_dataloader', 'train_cfg'):
        assert vim[key] == deit[key]


@pytest.mark.parametrize(
    'name',
    [
        'nano_upernet_1xb4-2k_camvid-192x256',
        'tiny_upernet_1xb16-10k_camvid-360x480',
        'nano_cascade-mask-rcnn_1xb2-2k_pennfudan-256',
        'tiny_cascade-mask-rcnn_1xb8-6k_pennfudan-256',
    ],
)
def test_sides_of_a_comparison_differ_in_the_backbone_only(name):
    vim, deit = load(f'vim/vim-{name}.py'), load(f'deit/deit-{name}.py')
    of_vim, of_deit = vim.model.pop('backbone'), deit.model.pop('backbone')
    assert (of_vim.type, of_deit.type) == ('VisionMamba', 'DeiT')
    for key in ('arch', 'img_size', 'patch_size'):
        assert of_vim.get(key) == of_deit.get(key)
    assert vim.pretty_text == deit.pretty_text


def test_every_direction_has_a_segmenter_that_differs_in_nothing_else():
    name = 'vim/vim-tiny{}_segmenter_8xb2-160k_ade20k-512x512.py'
    default = load(name.format(''))
    head = default.model.decode_head
    assert (head.type, head.num_layers) == ('SegmenterMaskTransformerHead', 2)
    for direction in ('none', 'sequence', 'block', 'ssm'):
        cfg = load(name.format(f'-{direction}'))
        assert cfg.model.backbone.pop('directions') == direction
        assert cfg.pretty_text == default.pretty_text


def test_cross_differs_from_the_recipe_in_the_direction_only():
    cfg = load('vim/vim-tiny-cross_upernet_8xb2-160k_ade20k-512x512.py')
    assert cfg.model.backbone.pop('directions') == 'cross'
    default = load('vim/vim-tiny_upernet_8xb2-160k_ade20k-512x512.py')
    assert cfg.pretty_text == default.pretty_text


def test_batch_norm_is_plain_until_training_is_distributed():
    for path in SEGMENTATION:
        cfg = Config.fromfile(path)
        assert 'SyncBN' not in str(cfg.to_dict())
        assert cfg.sync_bn == 'torch'


def test_the_example_of_the_readme_works(tmp_path):
    readme = (CONFIGS.parent / 'README.md').read_text(encoding='utf-8')
    example = readme.split('```python\n')[1].split('```')[0]
    assert 'VisionMamba' in example and 'init_cfg' in example
    (tmp_path / 'config.py').write_text(example)
    cfg = Config.fromfile(tmp_path / 'config.py')
    del cfg.model.backbone.init_cfg  # the weights are not here
    cfg.default_scope = 'mmseg'
    cfg.model.decode_head.norm_cfg = cfg.model.auxiliary_head.norm_cfg = dict(type='BN')
    model = build(cfg).eval()
    logits = model(torch.rand(1, 3, 96, 160), mode='tensor')
    assert logits.shape == (1, 19, 24, 40)  # stride 4


@pytest.mark.parametrize('path', SEGMENTATION, ids=lambda p: p.stem)
def test_a_training_step_reaches_every_parameter(path):
    """Distributed training waits for a gradient of every parameter that asks for one."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    cfg = Config.fromfile(path)
    cfg.model.data_preprocessor.size = (64, 64)
    model = build(cfg).train()
    samples = []
    for _ in range(2):
        labels = torch.randint(cfg.model.decode_head.num_classes, (1, 64, 64))
        samples.append(SegDataSample(gt_sem_seg=PixelData(data=labels)))
    images = [torch.randint(256, (3, 64, 64), dtype=torch.uint8) for _ in samples]
    batch = model.data_preprocessor(dict(inputs=images, data_samples=samples), training=True)
    loss, _ = model.parse_losses(model(**batch, mode='loss'))
    loss.backward()
    assert loss.isfinite()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
