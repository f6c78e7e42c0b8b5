import numpy as np
import pytest
import torch
from mmengine.model import ImgDataPreprocessor
from torch import nn

from mmvim import DeiT, VisionMamba
from mmvim.comparison.inside import (
    normalise,
    principal_colours,
    receptive_field,
    share_of_area,
)


class Convolutions(nn.Sequential):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (super().forward(x),)


def test_two_convolutions_see_five_pixels():
    torch.manual_seed(0)
    backbone = Convolutions(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1))
    field = receptive_field(backbone, torch.randn(1, 3, 11, 15))
    assert abs(field.sum() - 1) < 1e-9
    assert (field[3:8, 5:10] > 0).all()  # around (11 // 2, 15 // 2)
    field[3:8, 5:10] = 0
    assert not field.any()


@pytest.mark.parametrize(
    ('backbone', 'rows'),
    [
        (VisionMamba(dict(embed_dims=16, depth=2), 32, 8, cls_token=None), 4),
        (VisionMamba(dict(embed_dims=16, depth=2), 32, 8, cls_token=None, directions='none'), 3),
        (DeiT(dict(embed_dims=16, depth=2, num_heads=2), 32, 8, cls_token=None), 4),
    ],
)
def test_a_forward_scan_sees_what_is_before(backbone, rows):
    field = receptive_field(backbone.eval(), torch.randn(1, 3, 32, 32))
    patches = field.reshape(4, 8, 4, 8).sum((1, 3))  # the centre is patch (2, 2)
    assert (patches.sum(1) > 0).sum() == rows
    assert (patches[2, 3] > 0) == (rows == 4)


def test_share_of_area():
    field = np.zeros((4, 5))
    field[1, 2], field[3, :4] = 0.6, 0.1
    assert share_of_area(field, 0.5) == 1 / 20
    assert share_of_area(field, 0.75) == 3 / 20
    assert share_of_area(np.full((4, 5), 1 / 20), 0.49) == 10 / 20


def test_components_are_colours():
    halves = torch.zeros(1, 8, 4, 6)
    halves[0, 5, :, :3] = 7.0
    colours = principal_colours(halves + 1e-4 * torch.randn(1, 8, 4, 6))
    assert colours.shape == (4, 6, 3) and colours.dtype == np.uint8
    assert (colours[:, :3, 0] > 200).all() and (colours[:, 3:, 0] < 50).all()


def test_pictures_are_normalised_as_the_network_is_given_them():
    image = np.zeros((2, 3, 3), np.uint8)
    image[..., 0], image[..., 1] = 7, 30
    settings = dict(mean=[1, 10, 100], std=[1, 2, 4])
    values = normalise(image, ImgDataPreprocessor(**settings, bgr_to_rgb=True))
    assert values.shape == (1, 3, 2, 3)
    assert values[0, :, 1, 2].tolist() == [6, 10, -25]
    # Without the exchange a network gets blue first, as OpenMMLab's loaders give it.
    values = normalise(image, ImgDataPreprocessor(**settings))
    assert values[0, :, 1, 2].tolist() == [-1, 10, -93 / 4]
    assert normalise(image, ImgDataPreprocessor())[0, :, 1, 2].tolist() == [0, 30, 7]


def test_tokens_have_no_receptive_field():
    model = DeiT(dict(embed_dims=16, depth=1, num_heads=2), 32, 8, out_type='cls_token')
    with pytest.raises(ValueError, match=r"expected out_type='featmap', got .*\(1, 16\)"):
        receptive_field(model, torch.randn(1, 3, 32, 32))
