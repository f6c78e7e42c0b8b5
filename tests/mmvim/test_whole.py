"""Label maps of pictures in parts, against those of the whole picture."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import build_segmentor, scene

from mmvim.apis import predict
from mmvim.apis.tiled_head import Window, resize_window
from mmvim.apis.whole import WholeSegmentor
from mmvim.datasets.swaths import draw_map
from mmvim.utils.launch import UserError


@pytest.fixture
def build(tmp_path):
    """Builds the tiny segmentor with other settings."""
    return partial(build_segmentor, tmp_path)


def in_parts(model, picture: np.ndarray, folder, tile: int = 64) -> np.ndarray:
    labels = np.full(picture.shape[:2], -1)

    def write(row, column, part):
        place = labels[row : row + part.shape[0], column : column + part.shape[1]]
        assert (place == -1).all()
        place[:] = part

    def read(rows, columns):
        return picture[rows][:, columns]

    WholeSegmentor(model, tile)(labels.shape, read, write, folder)
    assert (labels >= 0).all()
    return labels


def scores(model, picture: np.ndarray) -> torch.Tensor:
    """(C, H, W), of the whole picture."""
    image = torch.from_numpy(picture[..., ::-1].copy()).permute(2, 0, 1)
    with torch.no_grad():
        x = model.data_preprocessor(dict(inputs=[image]))['inputs']
        return F.interpolate(model(x), picture.shape[:2], mode='bilinear')[0]


def assert_same(model, labels: np.ndarray, picture: np.ndarray) -> None:
    """Equal, but for pixels whose two best classes are as likely as each other."""
    (sample,) = predict(model, picture)
    expected = sample.pred_sem_seg.data[0].numpy()
    assert len(np.unique(expected)) > 1
    differ = labels != expected
    if differ.any():
        assert differ.mean() < 1e-3
        best = scores(model, picture).topk(2, 0).values
        assert float((best[0] - best[1])[torch.from_numpy(differ)].max()) < 1e-4


FCN = dict(
    type='FCNHead',
    _delete_=True,
    in_channels=32,
    in_index=3,
    channels=16,
    num_convs=2,
    kernel_size=3,
    num_classes=7,
    norm_cfg=dict(type='BN'),
    align_corners=False,
)
PSP = dict(FCN, type='PSPHead')
del PSP['num_convs'], PSP['kernel_size']
VARIANTS = {
    'uper': dict(),
    'fcn': dict(neck=None, decode_head=FCN),
    'psp': dict(decode_head=PSP),
    'tokens': dict(backbone=dict(cls_token='double', img_size=(48, 80))),
    'middle': dict(backbone=dict(cls_token='middle', directions='cross')),
    'pairs': dict(
        backbone=dict(directions='block', out_indices=(1, 3), rope=True, rope_residual=True),
        neck=None,
        decode_head=dict(FCN, in_index=1),
        auxiliary_head=None,
    ),
}


@pytest.mark.parametrize('variant', VARIANTS)
def test_parts_are_labelled_as_in_the_whole_picture(build, tmp_path, variant):
    model = build(**VARIANTS[variant])
    down, across = WholeSegmentor(model).multiple
    picture = scene(9 * down, 13 * across)
    assert_same(model, in_parts(model, picture, tmp_path), picture)


def test_a_picture_whose_sides_are_no_multiples_is_filled_up_by_its_border(build, tmp_path):
    model = build()
    picture = scene(75, 101)
    filled = np.pad(picture, ((0, 5), (0, 11), (0, 0)), 'edge')
    (sample,) = predict(model, filled)
    expected = sample.pred_sem_seg.data[0, :75, :101].numpy()
    assert (in_parts(model, picture, tmp_path) != expected).mean() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize('head', ['fcn', 'uper'])
def test_four_megapixels_are_labelled_to_the_pixel(build, tmp_path, head):
    model = build(backbone=dict(patch_size=16, img_size=128), **VARIANTS[head])
    picture, _ = draw_map(np.random.default_rng(0), 2000, 2000)
    labels = in_parts(model, picture, tmp_path, 512)
    missing = -2000 % WholeSegmentor(model).multiple[0]
    filled = np.pad(picture, ((0, missing), (0, missing), (0, 0)), 'edge')
    (sample,) = predict(model, filled)
    differ = labels != sample.pred_sem_seg.data[0, :2000, :2000].numpy()
    best = scores(model, filled)[:, :2000, :2000].topk(2, 0).values
    lead = (best[0] - best[1]) / best.abs().max()
    assert len(np.unique(labels)) > 1
    # None differed on the machine where this was written. Others may round differently where two
    # classes are as likely as each other.
    tied = (lead < 1e-5).numpy()
    assert tied.mean() < 1e-3 and not differ[~tied].any()


def test_one_output_channel_is_a_threshold(build, tmp_path):
    model = build(decode_head=dict(FCN, num_classes=2, out_channels=1, threshold=0.5), neck=None)
    picture = scene(64, 128)
    (score,) = scores(model, picture)
    with torch.no_grad():  # so that either class has some pixels
        model.decode_head.conv_seg.bias -= score.median()
    expected = scores(model, picture)[0] > 0
    assert 0.2 < expected.float().mean() < 0.8
    differ = torch.from_numpy(in_parts(model, picture, tmp_path) == 1) != expected
    assert differ.float().mean() < 1e-3


def test_scores_are_held_for_a_tile_only(build, tmp_path, monkeypatch):
    model = build(decode_head=FCN, neck=None)
    sizes = []
    forward = type(model.decode_head).forward
    segmentor = WholeSegmentor(model, 32)

    def watched(head, inputs):
        out = forward(head, inputs)
        sizes.append(max(out.shape[2:]))
        return out

    monkeypatch.setattr(type(model.decode_head), 'forward', watched)
    picture = scene(128, 256)
    segmentor(
        (128, 256), lambda rows, columns: picture[rows][:, columns], lambda *_: None, tmp_path
    )
    assert len(sizes) == 4 * 8 and max(sizes) <= 4 + 2 * segmentor.head.halo < 256 // 8


def test_a_stopped_call_goes_on_with_the_next_tile(build, tmp_path, monkeypatch):
    model = build(decode_head=FCN, neck=None)
    picture, tiles, stop = scene(64, 128), [], 3
    segmentor = WholeSegmentor(model, 32)

    def read(rows, columns):
        return picture[rows][:, columns]

    def write(row, column, part):
        if len(tiles) == stop:
            raise KeyboardInterrupt
        tiles.append((row, column, part))

    with pytest.raises(KeyboardInterrupt):
        segmentor((64, 128), read, write, tmp_path, key='one')
    stop = 100
    monkeypatch.setattr(segmentor, '_run_backbone', None)  # it must not run again
    segmentor((64, 128), read, write, tmp_path, key='one')
    places = [(row, column) for row, column, _ in tiles]
    assert places == [(row, column) for row in (0, 32) for column in (0, 32, 64, 96)]
    with pytest.raises(TypeError):  # of another picture it does
        segmentor((64, 128), read, write, tmp_path, key='two')


@pytest.mark.parametrize(
    'settings, reason',
    [
        (dict(test_cfg=dict(mode='slide', crop_size=(32, 32), stride=(16, 16))), 'mode is slide'),
        (dict(decode_head=dict(align_corners=True)), 'align_corners'),
        (dict(backbone=dict(stride=4)), 'overlap'),
        (dict(data_preprocessor=dict(test_cfg=dict(size_divisor=32))), 'size_divisor'),
        (dict(decode_head=dict(norm_cfg=dict(type='GN', num_groups=2))), 'depends on all'),
        (dict(neck=dict(norm_cfg=dict(type='GN', num_groups=2))), 'depends on all'),
    ],
)
def test_what_differs_in_parts_is_refused(build, settings, reason):
    with pytest.raises(UserError, match=reason):
        WholeSegmentor(build(**settings))


def test_attention_over_the_map_is_refused(build):
    head = dict(
        type='SegmenterMaskTransformerHead',
        _delete_=True,
        in_channels=32,
        channels=32,
        embed_dims=32,
        num_layers=1,
        num_heads=2,
        num_classes=7,
        loss_decode=dict(type='CrossEntropyLoss'),
    )
    model = build(neck=None, backbone=dict(out_indices=[3]), decode_head=head, auxiliary_head=None)
    with pytest.raises(UserError, match='depends on all'):
        WholeSegmentor(model)


@pytest.mark.parametrize('method', ['predict', 'predict_by_feat'])
def test_a_head_with_a_way_of_its_own_to_predict_is_refused(build, monkeypatch, method):
    model = build()
    monkeypatch.setattr(type(model.decode_head), method, lambda *_: None)
    with pytest.raises(UserError, match=f'way of its own .{method}'):
        WholeSegmentor(model)


def test_other_tasks_and_backbones_are_refused(build, monkeypatch):
    model = build()
    monkeypatch.setattr(model, 'backbone', torch.nn.Identity())
    with pytest.raises(UserError, match='VisionMamba'):
        WholeSegmentor(model)
    monkeypatch.setitem(model.cfg, 'default_scope', 'mmdet')
    with pytest.raises(UserError, match='segmentor'):
        WholeSegmentor(model)


def test_steps_of_the_pipeline_other_than_resizing_are_refused(build):
    model = build()
    steps = model.cfg.test_dataloader.dataset.pipeline
    steps.insert(1, dict(type='Resize', scale=(64, 64)))
    WholeSegmentor(model)
    steps.insert(1, dict(type='CLAHE'))
    with pytest.raises(UserError, match='CLAHE'):
        WholeSegmentor(model)


@pytest.mark.parametrize('small, size', [((1, 1), (9, 13)), ((2, 3), (7, 11)), ((6, 6), (12, 40))])
def test_a_window_of_a_resized_map(small, size):
    x = torch.randn(1, 3, *small, generator=torch.Generator().manual_seed(0))
    whole = F.interpolate(x, size, mode='bilinear', align_corners=False)
    window = Window(2, 6, 1, 9)
    torch.testing.assert_close(resize_window(x, size, window), whole[..., 2:6, 1:9])
