import pytest
import torch
from mmcv.ops import RoIAlign
from torch import nn

from mmvim import DeiT, SimpleFeaturePyramid
from mmvim.models.simple_feature_pyramid import LayerNorm2d

UPERNET = dict(in_channels=8, norm_cfg=dict(type='BN'))
VITDET = dict(in_channels=8, out_channels=6, num_outs=5)


def sizes(outs) -> list[tuple[int, ...]]:
    return [tuple(out.shape[1:]) for out in outs]


def test_upernet_style_keeps_the_channels_of_one_map_per_scale():
    maps = [torch.rand(2, width, 8, 12) for width in (4, 6, 8, 10)]
    neck = SimpleFeaturePyramid(in_channels=[4, 6, 8, 10], norm_cfg=dict(type='BN'))
    assert sizes(neck(maps)) == [(4, 32, 48), (6, 16, 24), (8, 8, 12), (10, 4, 6)]
    assert torch.equal(neck(maps)[2], maps[2])


def test_vitdet_style_makes_five_levels_from_one_map():
    outs = SimpleFeaturePyramid(**VITDET)(torch.rand(2, 8, 8, 12))
    assert sizes(outs) == [(6, 32, 48), (6, 16, 24), (6, 8, 12), (6, 4, 6), (6, 2, 3)]
    assert torch.equal(outs[4], outs[3][..., ::2, ::2])


@pytest.mark.parametrize('style', [UPERNET, VITDET])
@pytest.mark.parametrize('grid', [(1, 5), (5, 1), (1, 1)])
def test_maps_of_a_single_row_or_column_stay_so(style, grid):
    outs = SimpleFeaturePyramid(**style).eval()(torch.rand(1, 8, *grid))
    assert outs[3].shape[-2:] == (max(grid[0] // 2, 1), max(grid[1] // 2, 1))
    assert all(out.isfinite().all() for out in outs)


def test_halves_are_those_of_max_pooling():
    neck, x = SimpleFeaturePyramid(**UPERNET), torch.rand(1, 8, 5, 6)
    assert torch.equal(neck(x)[3], torch.nn.functional.max_pool2d(x, 2))


def test_one_map_may_come_in_a_tuple():
    neck, x = SimpleFeaturePyramid(**VITDET), torch.rand(1, 8, 4, 4)
    assert all(map(torch.equal, neck(x), neck((x,))))


def test_every_parameter_gets_a_gradient():
    for style in (UPERNET, VITDET):
        neck = SimpleFeaturePyramid(**style)
        sum(out.sum() for out in neck(torch.rand(2, 8, 4, 4))).backward()
        assert all(parameter.grad is not None for parameter in neck.parameters())


def test_norm_follows_norm_cfg():
    def norms(**args) -> set[type]:
        modules = SimpleFeaturePyramid(**args).modules()
        return {type(m) for m in modules if isinstance(m, nn.LayerNorm | nn.BatchNorm2d)}

    assert norms(**UPERNET) == {nn.BatchNorm2d}
    assert norms(**VITDET) == {LayerNorm2d}


def test_channel_norm_normalises_each_position_by_itself():
    x = 3 + 5 * torch.randn(2, 64, 3, 4)
    y = LayerNorm2d(64)(x)
    assert y.shape == x.shape
    assert y.mean(1).abs().max() < 1e-5 and (y.std(1, correction=0) - 1).abs().max() < 1e-4


@pytest.mark.parametrize('style', [UPERNET, VITDET])
def test_regions_can_be_read_from_every_level(style):
    """RoIAlign is silently wrong about maps that are not contiguous."""
    roi_align, region = RoIAlign(2, sampling_ratio=2), torch.tensor([[0.0, 0, 0, 3, 3]])
    backbone = DeiT(dict(embed_dims=8, depth=1, num_heads=1), img_size=64, cls_token=None)
    for level in SimpleFeaturePyramid(**style).eval()(backbone(torch.rand(1, 3, 64, 96))):
        copy = torch.empty_like(level, memory_format=torch.contiguous_format).copy_(level)
        assert torch.equal(roi_align(level, region), roi_align(copy, region))


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (dict(in_channels=[8, 8]), r'in_channels must be one number or 4.*got \[8, 8\]'),
        (dict(in_channels=8, scales=(8, 4)), 'scales must be out of .* got 8'),
        (dict(in_channels=8, num_outs=3), r'num_outs must be at least len\(scales\)=4, got 3'),
    ],
)
def test_bad_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        SimpleFeaturePyramid(**args)


def test_wrong_number_of_maps_is_named():
    with pytest.raises(ValueError, match='takes 1 or 4 maps, got 2.*out_indices'):
        SimpleFeaturePyramid(**UPERNET)([torch.rand(1, 8, 4, 4)] * 2)
