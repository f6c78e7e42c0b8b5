"""In a segmentor a position on the picture is the same position in the logits, at any size."""

import copy
import pickle

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.structures import PixelData
from mmseg.models import EncoderDecoder
from mmseg.structures import SegDataSample
from torch import nn

from mmvim import DeiT, SimpleFeaturePyramid, VisionMamba

DIMS = 4
HEAD = dict(
    type='FCNHead',
    in_channels=DIMS,
    channels=DIMS,
    num_convs=0,
    concat_input=False,
    num_classes=2,
    dropout_ratio=0,
    align_corners=False,
    loss_decode=dict(type='CrossEntropyLoss'),
)


def backbone(kind=VisionMamba, **args) -> nn.Module:
    """Its only output is the mean of each patch, in all channels."""
    heads = dict(num_heads=2) if kind is DeiT else {}
    arch = dict(embed_dims=DIMS, depth=1, **heads)
    model = kind(arch, in_channels=1, cls_token=None, pos_embed=False, final_norm=False, **args)
    nn.init.constant_(model.patch_embed.proj.weight, 1 / model.patch_embed.proj.weight[0].numel())
    for name, parameter in model.named_parameters():
        if name.endswith(('out_proj.weight', 'attn.proj.weight', 'fc2.weight')):
            nn.init.zeros_(parameter)
    return model


def segmentor(model: nn.Module, **test_cfg) -> EncoderDecoder:
    """The logit of class 0 is ½ and that of class 1 the mean of the patch, in both heads."""
    whole = EncoderDecoder(
        backbone=dict(type='VisionMamba', arch=dict(embed_dims=DIMS, depth=1)),
        decode_head=HEAD,
        auxiliary_head=HEAD,
        test_cfg=ConfigDict(test_cfg or dict(mode='whole')),
    )
    assert whole.backbone.patch_embed.remainder == 'resize'
    whole.backbone = model
    for head in (whole.decode_head, whole.auxiliary_head):
        head.conv_seg.weight.data[:, :, 0, 0] = torch.tensor([[0.0] * DIMS, [1, *[0] * (DIMS - 1)]])
        head.conv_seg.bias.data[:] = torch.tensor([0.5, 0])
    return whole.eval()


def ramp(height: int, width: int) -> torch.Tensor:
    """The value of a pixel is its horizontal position in pixels."""
    return (torch.arange(width) + 0.5).expand(1, 1, height, width).clone()


def step(edge: int, width: int, height: int = 64) -> torch.Tensor:
    picture = torch.zeros(1, 1, height, width)
    picture[..., edge:] = 1
    return picture


def sample_of(picture: torch.Tensor) -> SegDataSample:
    shape = tuple(picture.shape[2:])
    sample = SegDataSample(metainfo=dict(ori_shape=shape, img_shape=shape))
    sample.gt_sem_seg = PixelData(data=(picture[0] > 0.5).long())
    return sample


def shift(whole: EncoderDecoder, picture: torch.Tensor, margin: int = 16) -> float:
    """Greatest error of a position in pixels, but for half a patch at either border."""
    size = tuple(picture.shape[2:])
    logits = whole.inference(picture, [dict(ori_shape=size, img_shape=size)])[:, 1:]
    assert logits.shape == picture.shape
    return (logits - picture)[..., margin:-margin].abs().max().item()


@pytest.mark.parametrize('kind', [VisionMamba, DeiT])
@pytest.mark.parametrize('size', [(64, 683), (40, 100), (5, 81), (32, 64)])
def test_positions_are_kept_at_any_size(kind, size):
    assert shift(segmentor(backbone(kind)), ramp(*size)) < 0.01


@pytest.mark.parametrize('size', [(64, 683), (40, 100), (5, 81), (32, 64)])
@pytest.mark.parametrize(('stride', 'error'), [(8, 0.01), (4, 0.01), ((16, 8), 0.01), (5, 0.6)])
def test_positions_are_kept_by_overlapping_patches(stride, error, size):
    """An overlap of an odd number of pixels has no middle: half a pixel is lost."""
    assert shift(segmentor(backbone(stride=stride)), ramp(*size)) < error


def test_positions_are_kept_vertically():
    size = (90, 40)
    picture = ramp(*size[::-1]).transpose(2, 3)
    whole = segmentor(backbone(stride=(8, 16)))
    logits = whole.inference(picture, [dict(ori_shape=size, img_shape=size)])[:, 1:]
    assert (logits - picture)[:, :, 16:-16].abs().max() < 0.01


@pytest.mark.parametrize(('edge', 'width'), [(640, 683), (80, 100)])
@pytest.mark.parametrize('stride', [16, 8])
def test_an_edge_is_predicted_where_it_is(stride, edge, width):
    picture = step(edge, width)
    (result,) = segmentor(backbone(stride=stride)).predict(picture, [sample_of(picture)])
    predicted = result.pred_sem_seg.data[0, 32].argmax().item()  # the first pixel of class 1
    assert abs(predicted - edge) <= 1


@pytest.mark.parametrize('stride', [16, 8])
def test_losses_of_both_heads_are_least_where_the_edge_is(stride):
    whole, edges = segmentor(backbone(stride=stride)), range(560, 681, 10)
    for head in (whole.decode_head, whole.auxiliary_head):  # sharper, so that positions matter
        head.conv_seg.weight.data *= 20
        head.conv_seg.bias.data *= 20
    picture = step(640, 683)
    losses = [whole.loss(picture, [sample_of(step(edge, 683))]) for edge in edges]
    for name in ('decode.loss_ce', 'aux.loss_ce'):
        values = [loss[name].item() for loss in losses]
        assert edges[values.index(min(values))] == 640


def test_windows_of_the_slide_mode_keep_positions_too():
    whole = segmentor(backbone(), mode='slide', crop_size=(64, 90), stride=(64, 60))
    assert shift(whole, ramp(64, 250), margin=90) < 8  # borders of windows lack a neighbour
    exact = segmentor(backbone(), mode='slide', crop_size=(64, 96), stride=(64, 48))
    picture = ramp(64, 240)
    padded = segmentor(backbone(remainder='pad'), **exact.test_cfg)
    meta = [dict(ori_shape=(64, 240), img_shape=(64, 240))]
    assert torch.equal(exact.inference(picture, meta), padded.inference(picture, meta))


def test_elsewhere_and_on_request_maps_keep_their_stride():
    alone, padded = backbone(), segmentor(backbone(remainder='pad')).backbone
    picture = torch.ones(1, 1, 32, 40)
    for model in (alone.eval(), padded):
        assert torch.allclose(model(picture)[0][0, 0, 0], torch.tensor([1, 1, 0.5]))
    stretched = backbone(remainder='resize').eval()
    assert torch.allclose(stretched(picture)[0], torch.ones(1))


def test_a_backbone_that_was_copied_or_read_is_told():
    for copied in (copy.deepcopy(backbone()), pickle.loads(pickle.dumps(backbone()))):
        assert shift(segmentor(copied), ramp(40, 100)) < 0.01


def test_a_backbone_inside_another_module_is_told():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    assert shift(segmentor(Wrapper(backbone())), ramp(40, 100)) < 0.01


def test_pyramids_divide_an_odd_map_evenly_in_segmentors_only():
    x = torch.rand(1, DIMS, 5, 7)
    alone, told = (SimpleFeaturePyramid(DIMS, norm_cfg=dict(type='BN')) for _ in range(2))
    segmentor(backbone()).neck = told
    coarse = told(x)[3]
    assert coarse.shape == alone(x)[3].shape == (1, DIMS, 2, 3)
    assert torch.equal(told(x.flip(2, 3))[3].flip(2, 3), coarse)
    assert torch.equal(alone(x)[3], nn.functional.max_pool2d(x, 2))
    even = x[..., :4, :6]
    assert torch.equal(told(even)[3], alone(even)[3])


def test_pyramids_take_maps_of_one_row():
    outs = SimpleFeaturePyramid(DIMS, norm_cfg=dict(type='LN2d'))(torch.rand(1, DIMS, 1, 5))
    assert [tuple(out.shape[2:]) for out in outs] == [(4, 20), (2, 10), (1, 5), (1, 2)]
