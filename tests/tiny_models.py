"""Small models with the demos' configs, their checkpoints as initialised, and pictures."""

import copy
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

import mmvim  # noqa: F401  (registers the models)
from mmvim.apis import load_model
from mmvim.datasets.shapes import draw_scene

ROOT = Path(__file__).parents[1]
SEGMENTOR = """
_base_ = '{root}/configs/vim/vim-demo_upernet_shapes-128x128.py'
model = dict(
    backbone=dict(
        arch=dict(embed_dims=32, depth=4), img_size=64, out_indices=(0, 1, 2, 3)),
    neck=dict(in_channels=32),
    decode_head=dict(in_channels=[32] * 4, channels=16),
    auxiliary_head=dict(in_channels=32))
"""
DETECTOR = """
_base_ = '{root}/configs/vim/vim-demo_cascade-mask-rcnn_shapes-128x128.py'
model = dict(
    backbone=dict(arch=dict(embed_dims=32, depth=2), img_size=64),
    neck=dict(in_channels=32),
    test_cfg=dict(rcnn=dict(max_per_img=10)))
"""


def write_config(path: Path, text: str) -> Path:
    path.write_text(text.format(root=ROOT))
    return path


def write_checkpoint(path: Path, config: Path, **meta) -> Path:
    """Weights as a seed gives them, with every class of a segmentor as likely as another."""
    cfg = Config.fromfile(config)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
    if cfg.default_scope == 'mmseg' and hasattr(model.decode_head, 'conv_seg'):
        torch.nn.init.normal_(model.decode_head.conv_seg.weight)
    torch.save({'state_dict': model.state_dict(), 'meta': meta}, path)
    return path


def build_segmentor(folder: Path, **model):
    """The tiny segmentor with other settings, on the CPU."""
    path = write_config(folder / 'config.py', SEGMENTOR)
    config = Config.fromfile(path)
    config.merge_from_dict(dict(model=copy.deepcopy(model)))  # it takes _delete_ out
    config.dump(path)
    return load_model(path, write_checkpoint(folder / 'weights.pth', path), device='cpu')


def scene(height: int, width: int) -> np.ndarray:
    """A picture (height, width, 3), RGB, of generated shapes."""
    side = max(height, width)
    return draw_scene(np.random.default_rng(0), side).image[:height, :width, ::-1].copy()
