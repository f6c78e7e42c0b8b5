"""What the official code computed, and its arguments in the terms of this project."""

from pathlib import Path

import torch

GOLDEN = torch.load(Path(__file__).parent / 'data' / 'vim_official.pt', weights_only=True)
DIRECTIONS = {'v2': 'ssm_conv', 'v1': 'ssm', 'none': 'none'}


def arguments(official: dict) -> dict:
    """The official code's arguments in the terms of this project."""
    cls_token = None
    if official['if_cls_token']:
        places = {'use_double_cls_token': 'double', 'use_middle_cls_token': 'middle'}
        cls_token = next((place for key, place in places.items() if official.get(key)), 'head')
    args = dict(
        arch=dict(embed_dims=official['embed_dim'], depth=official['depth']),
        img_size=official['img_size'],
        directions=DIRECTIONS[official['bimamba_type']],
        cls_token=cls_token,
        reduction='mean' if official['if_divide_out'] else 'sum',
        norm='rms' if official.get('rms_norm', True) else 'layer',
        layer_scale=official.get('init_layer_scale'),
        stride=official.get('stride'),
    )
    if official.get('if_bidirectional'):
        args['directions'] = 'block'
    if official.get('if_rope'):
        args.update(rope=True, rope_residual=official['if_rope_residual'])
        args['rope_grid'] = official['pt_hw_seq_len']
    return args


def assert_near(ours: torch.Tensor, official: torch.Tensor, what: str) -> None:
    assert ours.shape == official.shape, what
    error = (ours - official).norm() / official.norm()
    assert error < 1e-4, f'{what}: relative error {error:.1e}'
