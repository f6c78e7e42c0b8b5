"""Label maps of windows whose scores are blended, against a plain way that holds all of them."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny_models import build_segmentor, scene
from torch import nn

from mmvim.apis import predict
from mmvim.apis.windows import WindowedSegmentor, blending_weights, window_starts
from mmvim.utils.launch import UserError


@pytest.fixture
def build(tmp_path):
    """Builds the tiny segmentor with other settings."""
    return partial(build_segmentor, tmp_path)


def in_windows(model, picture: np.ndarray, folder, *arguments) -> np.ndarray:
    labels = np.full(picture.shape[:2], -1)

    def write(row, column, part):
        place = labels[row : row + part.shape[0], column : column + part.shape[1]]
        assert (place == -1).all()
        place[:] = part

    segmentor = WindowedSegmentor(model, *arguments)
    segmentor(labels.shape, lambda rows, columns: picture[rows][:, columns], write, folder)
    assert (labels >= 0).all()
    return labels


def scores_of(model, picture: np.ndarray) -> np.ndarray:
    """(classes, h, w), of a picture by itself."""
    image = torch.from_numpy(picture[..., ::-1].copy()).permute(2, 0, 1)
    with torch.no_grad():
        x = model.data_preprocessor(dict(inputs=[image]))['inputs']
        (scores,) = model.encode_decode(x, [dict(img_shape=picture.shape[:2])])
    return scores.double().numpy()


def naive_scores(model, picture: np.ndarray, side: int, overlap: int) -> np.ndarray:
    """What is to be computed, (classes, H, W): all of it held, one window added after the other."""
    sides = [min(side, length) for length in picture.shape[:2]]
    tops, lefts = (window_starts(length, side, overlap) for length in picture.shape[:2])
    down, across = blending_weights(tops, sides[0]), blending_weights(lefts, sides[1])
    total = 0
    for k, top in enumerate(tops):
        for j, left in enumerate(lefts):
            place = slice(top, top + sides[0]), slice(left, left + sides[1])
            scores = scores_of(model, picture[place])
            window = np.zeros((len(scores), *picture.shape[:2]))
            window[(slice(None), *place)] = scores * np.outer(down[k], across[j])
            total = total + window
    return total


def assert_best(labels: np.ndarray, scores: np.ndarray) -> None:
    """Labels are those of the best scores, where two are not as good as each other."""
    lead = scores.max(0) - np.take_along_axis(scores, labels[None], 0)[0]
    assert lead.max() < 1e-4 and (labels != scores.argmax(0)).mean() < 1e-3
    assert len(np.unique(labels)) > 1


PLACEMENTS = [(100, 40, 10), (100, 40, 0), (101, 40, 30), (97, 64, 1), (40, 40, 39), (20, 40, 10)]


@pytest.mark.parametrize('length, side, overlap', [*PLACEMENTS, (100, 1, 0), (41, 40, 20)])
def test_windows_cover_a_side_and_their_weights_sum_to_one_everywhere(length, side, overlap):
    starts = window_starts(length, side, overlap)
    side = min(side, length)
    assert starts[0] == 0 and starts[-1] + side == length
    assert all(0 < b - a <= side - overlap for a, b in pairwise(starts))
    weights = blending_weights(starts, side)
    assert weights.shape == (len(starts), side) and (weights > 0).all()
    total = torch.zeros(length, dtype=torch.float64)
    for start, line in zip(starts, weights, strict=True):
        total[start : start + side] += line
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)


def test_windows_are_no_more_than_it_takes_and_fade_in():
    assert window_starts(100, 40, 10) == [0, 30, 60]
    first, second, _ = blending_weights([0, 30, 60], 40)
    assert first[:30].eq(1).all() and second[10:30].eq(1).all()
    x = (torch.arange(10, dtype=torch.float64) + 0.5) / 10
    torch.testing.assert_close(second[:10], (torch.pi / 2 * x).sin() ** 2)


GN = dict(type='GN', num_groups=2)
FCN = dict(
    type='FCNHead',
    _delete_=True,
    in_channels=32,
    in_index=-1,
    channels=32,
    num_convs=0,
    concat_input=False,
    num_classes=7,
    align_corners=False,
)
VARIANTS = {
    'uper': dict(),
    'group norm': dict(decode_head=dict(norm_cfg=GN), neck=dict(norm_cfg=GN)),
    'slide': dict(test_cfg=dict(mode='slide', crop_size=(32, 32), stride=(16, 16))),
    'padded': dict(data_preprocessor=dict(test_cfg=dict(size_divisor=64))),
    'deit and setr': dict(
        backbone=dict(
            _delete_=True,
            type='DeiT',
            arch=dict(embed_dims=32, depth=2, num_heads=2),
            img_size=64,
            patch_size=8,
        ),
        neck=None,
        auxiliary_head=None,
        decode_head=dict(
            FCN,
            type='SETRUPHead',
            in_channels=32,
            num_convs=1,
            kernel_size=3,
            up_scale=2,
            norm_cfg=dict(type='BN'),
            align_corners=True,
        ),
    ),
    'convolutions': dict(
        backbone=dict(
            _delete_=True,
            type='UNet',
            base_channels=8,
            num_stages=2,
            strides=(1, 1),
            enc_num_convs=(1, 1),
            dec_num_convs=(1,),
            downsamples=(True,),
            enc_dilations=(1, 1),
            dec_dilations=(1,),
            norm_cfg=dict(type='BN'),
        ),
        neck=None,
        auxiliary_head=None,
        decode_head=dict(FCN, in_channels=8, channels=8),
    ),
}
del VARIANTS['deit and setr']['decode_head']['concat_input']


@pytest.mark.parametrize('variant', VARIANTS)
def test_one_window_for_all_of_a_picture_is_the_plain_prediction(build, tmp_path, variant):
    model = build(**VARIANTS[variant])
    picture = scene(48, 70)
    labels = in_windows(model, picture, tmp_path, 70)
    model.test_cfg.mode = 'whole'  # one window is in place of those of mode slide
    (sample,) = predict(model, picture)
    assert (labels == sample.pred_sem_seg.data[0].numpy()).all()
    assert len(np.unique(labels)) > 1


@pytest.mark.parametrize('batch_size', [1, 3])
@pytest.mark.parametrize(
    'size, side, overlap',
    [((100, 150), 64, 16), ((90, 131), 48, 32), ((64, 128), 32, 0), ((40, 150), 64, None)],
    ids=['some overlap', 'more than half', 'none', 'lower than a window'],
)
def test_windows_are_blended_as_in_the_plain_way(build, tmp_path, size, side, overlap, batch_size):
    model, picture = build(), scene(*size)
    labels = in_windows(model, picture, tmp_path, side, overlap, batch_size)
    assert_best(
        labels, naive_scores(model, picture, side, side // 4 if overlap is None else overlap)
    )


class Pointwise(nn.Module):
    """A backbone that sees a pixel at a time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 32, 1)

    def forward(self, x):
        return (self.conv(x),)


@pytest.mark.parametrize('side, overlap', [(32, 0), (50, 30), (17, 5), (200, None)])
def test_of_pixels_by_themselves_windows_change_nothing(build, tmp_path, side, overlap):
    model, picture = build(neck=None, auxiliary_head=None, decode_head=FCN), scene(75, 101)
    model.backbone = Pointwise()
    assert_best(in_windows(model, picture, tmp_path, side, overlap), scores_of(model, picture))


def test_one_output_channel_is_a_threshold(build, tmp_path):
    head = dict(FCN, num_classes=2, out_channels=1, threshold=0.5)
    model, picture = build(neck=None, auxiliary_head=None, decode_head=head), scene(75, 101)
    model.backbone = Pointwise()
    (score,) = scores_of(model, picture)
    with torch.no_grad():  # so that either class has some pixels
        model.decode_head.conv_seg.bias -= float(np.median(score))
    labels = in_windows(model, picture, tmp_path, 40)
    expected = scores_of(model, picture)[0] > 0
    assert 0.2 < expected.mean() < 0.8 and (labels != expected).mean() < 1e-3


def test_a_stopped_call_goes_on_with_its_row_of_windows(build, tmp_path):
    model, picture = build(), scene(100, 150)
    expected = in_windows(model, picture, tmp_path, 48, 24)
    (tmp_path / 'windows.json').unlink()
    labels, tops, stop = np.full((100, 150), -1), [], True

    def read(rows, columns):
        if stop and rows[0] > 0 and columns[0] > 0:
            raise KeyboardInterrupt
        tops.append(rows[0])
        return picture[rows][:, columns]

    def write(row, column, part):
        labels[row : row + part.shape[0], column : column + part.shape[1]] = part

    segmentor = WindowedSegmentor(model, 48, 24)
    with pytest.raises(KeyboardInterrupt):
        segmentor((100, 150), read, write, tmp_path, key='one')
    assert set(tops) == {0, 17}  # the second row has begun
    stop = False
    tops.clear()
    segmentor((100, 150), read, write, tmp_path, key='one')
    assert min(tops) == 17
    assert (labels == expected).all()
    tops.clear()
    segmentor((100, 150), read, write, tmp_path, key='two')  # of another picture
    assert min(tops) == 0


def test_scores_on_disk_are_of_overlaps_only(build, tmp_path):
    model, picture = build(), scene(152, 96)
    sizes = []

    def write(*_):
        sizes.append(sum(path.stat().st_size for path in tmp_path.glob('overlap-*')))

    segmentor = WindowedSegmentor(model, 32, 8)
    segmentor((152, 96), lambda rows, columns: picture[rows][:, columns], write, tmp_path)
    assert window_starts(152, 32, 8)[:2] == [0, 24]
    assert 0 < max(sizes) <= 2 * 4 * 7 * 96 * 8


def test_what_is_no_segmentor_is_refused(build, monkeypatch):
    model = build()
    monkeypatch.setattr(type(model), 'postprocess_result', lambda *_: None)
    with pytest.raises(UserError, match='way of its own'):
        WindowedSegmentor(model, 64)
    monkeypatch.setitem(model.cfg, 'default_scope', 'mmdet')
    with pytest.raises(UserError, match='it must be a segmentor'):
        WindowedSegmentor(model, 64)


def test_steps_of_the_pipeline_other_than_resizing_are_refused(build):
    model = build()
    model.cfg.test_dataloader.dataset.pipeline.insert(1, dict(type='CLAHE'))
    with pytest.raises(UserError, match='CLAHE'):
        WindowedSegmentor(model, 64)
