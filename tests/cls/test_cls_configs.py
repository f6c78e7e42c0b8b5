"""The classification configs build, say what the recipe says, and learn in every parameter."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.utils import import_modules_from_strings
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample

CONFIGS = Path(__file__).parents[2] / 'configs'
READY = sorted(CONFIGS.rglob('*_in1k.py'))
# docs/ablations.md has the same rows.
DIRECTIONS = ('none', 'sequence', 'block', 'ssm', 'mean-pool')
DESIGNS = ('mean-pool', 'max-pool', 'head-token', 'double-token', '')


def load(name: str) -> Config:
    return Config.fromfile(CONFIGS / 'vim' / f'{name}_8xb128_in1k.py')


def build(cfg: Config):
    import_modules_from_strings(**cfg.custom_imports)
    init_default_scope(cfg.default_scope)
    return MODELS.build(dict(cfg.model, data_preprocessor=cfg.data_preprocessor))


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize('path', READY, ids=lambda path: path.stem)
def test_a_training_step_reaches_every_parameter(path):
    cfg = Config.fromfile(path)
    model = build(cfg).train()
    samples = [DataSample().set_gt_label(label) for label in (3, 999)]
    images = [torch.randint(256, (3, 64, 64), dtype=torch.uint8) for _ in samples]
    batch = model.data_preprocessor(dict(inputs=images, data_samples=samples), training=True)
    loss, _ = model.parse_losses(model(**batch, mode='loss'))
    loss.backward()
    assert 5 < loss.item() < 9  # near ln(1000)
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    scores = model.eval()(batch['inputs'], mode='predict', data_samples=samples)
    assert scores[0].pred_score.shape == (1000,)
    assert cfg.default_scope == 'mmpretrain'
    hooks = [hook.type for hook in cfg.custom_hooks]
    assert 'StopAtNonFiniteHook' in hooks and ('EMAHook' in hooks) == ('stride8' not in path.stem)


@pytest.mark.parametrize(
    'name',
    [
        'nano_1xb64-8e_imagenette-96',
        'nano-stride4_1xb64-2e_imagenette-96',
        'tiny_1xb128-100e_imagenette-128',
    ],
)
def test_sides_of_the_comparison_differ_in_the_backbone_only(name):
    sides = [Config.fromfile(CONFIGS / f'{side}/{side}-{name}.py') for side in ('vim', 'deit')]
    for cfg in sides:
        assert parameters(build(cfg)) > 0
    backbones = [cfg.model.pop('backbone') for cfg in sides]
    for key in ('arch', 'img_size', 'patch_size', 'stride', 'drop_path_rate'):
        assert backbones[0].get(key) == backbones[1].get(key)
    starts = [str(cfg.pop('load_from')) for cfg in sides]
    assert starts[0].replace('vim', 'deit') == starts[1]
    assert sides[0].pretty_text == sides[1].pretty_text


@pytest.mark.parametrize(
    ('name', 'count'), [('tiny', 7_148_008), ('small', 25_796_584), ('base', 97_598_440)]
)
def test_sizes_are_the_papers(name, count):
    assert parameters(build(load(f'vim-{name}'))) == count


def test_recipe():
    cfg = load('vim-tiny')
    optimizer, (warm_up, cosine) = cfg.optim_wrapper.optimizer, cfg.param_scheduler
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 1e-3, 0.05)
    assert cfg.train_cfg.max_epochs == cosine.end == 300 and warm_up.end == cosine.begin == 5
    assert 8 * cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size == 1024
    assert cfg.model.head.loss.label_smooth_val == 0.1
    augmentations = [step.type for step in cfg.train_dataloader.dataset.pipeline]
    assert augmentations[1:4] == ['RandomResizedCrop', 'RandomFlip', 'RandomErasing']
    assert cfg.model.train_cfg.augments.type == 'Mixup'


def test_long_sequence_fine_tuning():
    cfg = load('vim-tiny_stride8-ft')
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.lr, optimizer.weight_decay) == (1e-5, 1e-8)
    assert (cfg.param_scheduler, cfg.train_cfg.max_epochs) == ([], 30)
    assert build(cfg).backbone.grid == (27, 27)


def test_what_is_not_to_be_decayed_is_not():
    cfg = load('vim-tiny')
    model = build(cfg)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    decay = {p: group['weight_decay'] for group in optimizer.param_groups for p in group['params']}
    undecayed = {name for name, p in model.named_parameters() if decay[p] == 0}
    kinds = {name.split('.', 3)[-1] if '.layers.' in name else name for name in undecayed}
    assert kinds == {
        *('norm.weight', 'mixer.A_log', 'mixer.A_b_log', 'mixer.D', 'mixer.D_b'),
        *(f'mixer.{layer}.bias' for layer in ('conv1d', 'conv1d_b', 'dt_proj', 'dt_proj_b')),
        *('backbone.cls_token', 'backbone.pos_embed', 'backbone.norm_f.weight'),
        *('backbone.patch_embed.proj.bias', 'head.fc.bias'),
    }


@pytest.mark.parametrize(('rows', 'key'), [(DIRECTIONS, 'directions'), (DESIGNS, 'cls_token')])
def test_every_row_of_the_ablations_changes_one_thing(rows, key):
    configs = [load(f'vim-tiny-{row}' if row else 'vim-tiny') for row in rows]
    backbones = [dict(cfg.model.backbone) for cfg in configs]
    if key == 'directions':
        assert [b.pop(key, 'ssm_conv') for b in backbones] == [
            *('none', 'sequence', 'block', 'ssm', 'ssm_conv')
        ]
    else:
        designs = [(b.pop(key), b.pop('out_type')) for b in backbones]
        assert designs == [
            (None, 'avg_featmap'),
            (None, 'raw'),
            *((place, 'cls_token') for place in ('head', 'double', 'middle')),
        ]
    assert all(backbone == backbones[0] for backbone in backbones)
    for part in ('optim_wrapper', 'param_scheduler', 'train_dataloader', 'custom_hooks'):
        assert all(cfg[part] == configs[0][part] for cfg in configs)
