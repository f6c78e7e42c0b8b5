import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

from mmvim import DeiT, VisionMamba


def model() -> nn.Module:
    whole = nn.Module()
    whole.backbone = VisionMamba(
        dict(embed_dims=16, depth=3), norm='layer', layer_scale=0.1, cls_token='double', img_size=32
    )
    whole.head = nn.Conv2d(16, 4, 1)
    return whole


def groups(whole=None, **paramwise) -> dict[str, dict]:
    """Parameter name -> its group."""
    wrapper = build_optim_wrapper(
        whole or model(),
        dict(
            type='OptimWrapper',
            optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.5),
            constructor='VimOptimWrapperConstructor',
            paramwise_cfg=paramwise or None,
        ),
    )
    return {name: g for g in wrapper.optimizer.param_groups for name in g['param_names']}


def test_every_trained_parameter_is_in_one_group():
    whole = model()
    whole.backbone.patch_embed.requires_grad_(False)
    found = groups(whole)
    trained = {name for name, p in whole.named_parameters() if p.requires_grad}
    assert set(found) == trained
    assert sum(len(g['params']) for g in {id(g): g for g in found.values()}.values()) == len(
        trained
    )


def test_no_weight_decay_where_the_recipe_says_so():
    undecayed = {name for name, group in groups().items() if group['weight_decay'] == 0}
    kept = {name for name, group in groups().items() if group['weight_decay'] == 0.5}
    for ending in (
        'A_log',
        'A_b_log',
        '.D',
        'D_b',
        'norm.weight',
        'norm_f.weight',
        'bias',
        'gamma',
    ):
        assert any(name.endswith(ending) for name in undecayed), ending
        assert not any(name.endswith(ending) for name in kept), ending
    assert {f'backbone.{n}' for n in ('pos_embed', 'cls_token_head', 'cls_token_tail')} < undecayed
    assert {'head.weight', 'backbone.patch_embed.proj.weight'} < kept
    for layer in ('in_proj', 'x_proj', 'dt_proj', 'conv1d', 'out_proj', 'conv1d_b'):
        assert f'backbone.layers.0.mixer.{layer}.weight' in kept


def test_learning_rate_falls_from_the_head_to_the_image():
    rates = {name: round(group['lr'], 6) for name, group in groups(layer_decay_rate=0.5).items()}
    assert rates['head.weight'] == rates['backbone.norm_f.weight'] == 1
    assert rates['backbone.layers.2.mixer.D'] == 0.5
    assert rates['backbone.layers.0.norm.weight'] == 0.125
    assert rates['backbone.pos_embed'] == rates['backbone.patch_embed.proj.bias'] == 0.0625
    assert rates['backbone.cls_token_tail'] == 0.0625


def test_models_say_it_as_timm_and_mmpretrain_expect():
    whole = model()
    backbone = whole.backbone
    names = backbone.no_weight_decay()
    assert {'pos_embed', 'cls_token_head', 'cls_token_tail'} < names
    assert {'layers.0.mixer.A_log', 'layers.2.mixer.A_b_log'} < names
    assert names <= {name for name, _ in backbone.named_parameters()}
    assert backbone.get_layer_depth('layers.2.mixer.D') == (3, 5)
    assert whole.backbone.get_layer_depth('backbone.pos_embed', 'backbone.') == (0, 5)
    assert whole.backbone.get_layer_depth('head.weight', 'backbone.') == (4, 5)


def test_without_a_rate_all_layers_learn_alike():
    assert {group['lr'] for group in groups().values()} == {1.0}


def test_deit_of_mmseg_is_understood():
    from mmseg.models.backbones import VisionTransformer

    whole = nn.Module()
    whole.backbone = VisionTransformer(embed_dims=16, num_layers=2, num_heads=2, out_indices=1)
    found = groups(whole, layer_decay_rate=0.5)
    assert found['backbone.cls_token']['weight_decay'] == 0
    assert found['backbone.patch_embed.projection.weight']['lr'] == 0.125
    assert found['backbone.layers.1.ffn.layers.1.weight']['lr'] == 0.5


def test_deit_decays_by_block():
    whole = nn.Module()
    whole.backbone = DeiT(
        dict(embed_dims=16, depth=2, num_heads=2), cls_token=None, window_size=2, rel_pos=True
    )
    found = groups(whole, layer_decay_rate=0.5)
    assert found['backbone.norm.weight']['lr'] == 1
    assert found['backbone.blocks.1.mlp.fc2.weight']['lr'] == 0.5
    assert found['backbone.blocks.0.attn.qkv.weight']['lr'] == 0.25
    assert found['backbone.patch_embed.proj.weight']['lr'] == 0.125
    for name in ('pos_embed', 'blocks.0.attn.rel_pos_h', 'blocks.0.norm1.weight'):
        assert found[f'backbone.{name}']['weight_decay'] == 0
    assert found['backbone.blocks.0.attn.proj.weight']['weight_decay'] == 0.5


@pytest.mark.parametrize(
    ('paramwise', 'message'),
    [
        (dict(layer_decay_rate=1.5), r'must lie in \(0, 1\], got 1.5'),
        (dict(layer_decay=0.9), r"got also \['layer_decay'\]"),
    ],
)
def test_bad_arguments_are_named(paramwise, message):
    with pytest.raises(ValueError, match=message):
        groups(**paramwise)


def test_layer_decay_needs_layers():
    with pytest.raises(ValueError, match='needs a model with backbone.get_layer_depth, '):
        groups(torch.nn.Linear(2, 2), layer_decay_rate=0.9)
