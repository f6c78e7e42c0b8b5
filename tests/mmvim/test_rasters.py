"""GeoTIFFs in, label maps with the same place on earth out."""

import importlib.util

import numpy as np
import pytest
from tiny_models import SEGMENTOR, scene, write_checkpoint, write_config

from mmvim.apis import PictureError, load_model, predict, predict_raster
from mmvim.datasets.shapes import CLASSES
from mmvim.utils.launch import UserError

if importlib.util.find_spec('rasterio') is None:
    pytest.skip("rasterio (the extra 'geo') is not installed", allow_module_level=True)

import rasterio
from rasterio.transform import from_origin

PLACE = dict(crs='EPSG:32633', transform=from_origin(500_000, 5_000_000, 0.5, 0.5))


def write_raster(path, bands: np.ndarray, **profile):
    """Bands (count, H, W) with a place on earth."""
    count, height, width = bands.shape
    profile = dict(
        driver='GTiff', count=count, height=height, width=width, dtype=bands.dtype, **profile
    )
    profile = {**PLACE, 'tiled': True, 'blockxsize': 64, 'blockysize': 64, **profile}
    with rasterio.open(path, 'w', **profile) as file:
        file.write(bands)
    return path


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('segmentor')
    config = write_config(folder / 'config.py', SEGMENTOR)
    return config, write_checkpoint(folder / 'weights.pth', config)


@pytest.fixture(scope='module')
def model(files):
    return load_model(*files, device='cpu')


def differing(labels: np.ndarray, model, picture: np.ndarray) -> float:
    """The share of pixels whose label is not that of the ordinary way."""
    (sample,) = predict(model, picture)
    return float((labels != sample.pred_sem_seg.data[0].numpy()).mean())


def test_pixels_without_data_get_no_label(model, tmp_path):
    bands = scene(64, 96).transpose(2, 0, 1).copy()
    bands[:, :20, :30] = 7
    source = write_raster(tmp_path / 'in.tif', bands, photometric='rgb', nodata=7)
    _, small = predict_raster(model, source, tmp_path / 'out.tif')
    with rasterio.open(tmp_path / 'out.tif') as file:
        labels = file.read(1)
        assert file.nodata == 255
    holes = (bands == 7).all(0)
    assert holes[:20, :30].all() and ((labels == 255) == holes).all()
    assert ((small == len(CLASSES)) == holes).all()


def test_alpha_is_blended_on_white_and_transparent_pixels_get_no_label(model, tmp_path):
    picture = scene(64, 96)
    alpha = np.full((64, 96, 1), 255, np.uint8)
    alpha[:, :40] = 0
    bands = np.dstack([picture, alpha]).transpose(2, 0, 1)
    source = write_raster(tmp_path / 'in.tif', bands, photometric='rgb', alpha='yes')
    predict_raster(model, source, tmp_path / 'out.tif')
    with rasterio.open(tmp_path / 'out.tif') as file:
        labels = file.read(1)
    assert (labels[:, :40] == 255).all()
    (sample,) = predict(model, np.dstack([picture, alpha]))
    assert (labels != sample.pred_sem_seg.data[0].numpy())[:, 40:].mean() < 1e-3


def test_sixteen_bits_need_their_depth(model, tmp_path):
    grey = scene(64, 96)[..., 0].astype(np.uint16) * 16
    source = write_raster(tmp_path / 'in.tif', grey[None])
    with pytest.raises(PictureError, match='--depth'):
        predict_raster(model, source, tmp_path / 'out.tif')
    predict_raster(model, source, tmp_path / 'out.tif', depth=12)
    (sample,) = predict(model, grey, depth=12)
    with rasterio.open(tmp_path / 'out.tif') as file:
        assert (file.read(1) != sample.pred_sem_seg.data[0].numpy()).mean() < 1e-3


@pytest.mark.parametrize(
    'bands, profile, reason',
    [
        (np.zeros((2, 64, 64), np.uint8), {}, 'bands must be'),
        (np.zeros((5, 64, 64), np.uint8), dict(photometric='minisblack'), 'bands must be'),
        (np.zeros((3, 64, 64), np.float32), dict(photometric='rgb'), 'uint8 or uint16'),
        (np.zeros((1, 64, 64), np.int16), {}, 'uint8 or uint16'),
        (np.zeros((1, 64, 64), np.uint8), dict(nbits=4), 'its samples have 4 bits'),
        (np.zeros((1, 64, 64), np.uint8), dict(photometric='miniswhite'), '0 is white'),
    ],
)
def test_other_samples_are_refused(model, tmp_path, bands, profile, reason):
    source = write_raster(tmp_path / 'in.tif', bands, **profile)
    with pytest.raises(PictureError, match=reason):
        predict_raster(model, source, tmp_path / 'out.tif')


def test_a_raster_is_not_replaced_by_its_labels(model, tmp_path):
    source = write_raster(tmp_path / 'in.tif', np.zeros((1, 64, 64), np.uint8))
    before = source.read_bytes()
    (tmp_path / 'link.tif').symlink_to(source)
    for target in (source, tmp_path / 'link.tif'):
        with pytest.raises(UserError, match='target is the raster itself'):
            predict_raster(model, source, target)
    assert source.read_bytes() == before


def test_a_palette_is_refused(model, tmp_path):
    source = write_raster(tmp_path / 'in.tif', np.zeros((1, 64, 64), np.uint8))
    with rasterio.open(source, 'r+') as file:
        file.write_colormap(1, {0: (255, 0, 0, 255)})
    with pytest.raises(PictureError, match='palette'):
        predict_raster(model, source, tmp_path / 'out.tif')


def test_a_stopped_raster_goes_on(model, tmp_path, monkeypatch):
    picture = scene(64, 192)
    source = write_raster(tmp_path / 'in.tif', picture.transpose(2, 0, 1), photometric='rgb')
    target, seen = tmp_path / 'out.tif', []

    def track(items, what, stop=None):
        for k, item in enumerate(items):
            if k == stop:
                raise KeyboardInterrupt
            seen.append(what)
            yield item

    def stopping(items, what):
        return track(items, what, 1 if what == 'labels' else None)

    with pytest.raises(KeyboardInterrupt):
        predict_raster(model, source, target, tile=64, track=stopping)
    assert not target.exists()
    seen.clear()
    predict_raster(model, source, target, tile=64, track=track)
    assert 'backbone' not in seen and seen.count('labels') == 2
    with rasterio.open(target) as file:
        assert differing(file.read(1), model, picture) < 1e-3


def stop_at(tile):
    """A progress bar in which someone stops the call at one of the tiles of labels."""

    def track(items, what):
        for k, item in enumerate(items):
            if what == 'labels' and k == tile:
                raise KeyboardInterrupt
            yield item

    return track


def test_windows_and_the_whole_leave_each_other_nothing(model, tmp_path):
    picture = scene(64, 160)
    source = write_raster(tmp_path / 'in.tif', picture.transpose(2, 0, 1), photometric='rgb')
    windows = dict(windows=64, overlap=24, batch_size=2)
    predict_raster(model, source, tmp_path / 'expected.tif', **windows)
    target = tmp_path / 'out.tif'

    stopping = stop_at(1)
    with pytest.raises(KeyboardInterrupt):
        predict_raster(model, source, target, tile=64, track=stopping)
    assert (tmp_path / 'out.tif.parts' / 'maps.json').exists()
    with pytest.raises(KeyboardInterrupt):
        predict_raster(
            model, source, target, track=lambda items, what: stopping(items, 'labels'), **windows
        )
    assert not (tmp_path / 'out.tif.parts' / 'maps.json').exists()
    predict_raster(model, source, target, **windows)
    with rasterio.open(tmp_path / 'expected.tif') as expected, rasterio.open(target) as file:
        assert (file.read(1) == expected.read(1)).all()
        assert file.transform == PLACE['transform'] and file.colormap(1) == expected.colormap(1)
        assert differing(file.read(1), model, picture) > 0.01  # windows do not see the whole


@pytest.mark.parametrize(
    'setting',
    [
        {'model.data_preprocessor.mean': [0.0, 0.0, 0.0]},
        {'model.decode_head.in_index': [3, 2, 1, 0]},
    ],
)
def test_another_setting_of_the_same_weights_begins_anew(files, model, tmp_path, setting):
    other = load_model(*files, device='cpu', options=setting)
    picture = scene(64, 192)
    source = write_raster(tmp_path / 'in.tif', picture.transpose(2, 0, 1), photometric='rgb')
    target = tmp_path / 'out.tif'

    with pytest.raises(KeyboardInterrupt):
        predict_raster(model, source, target, tile=64, track=stop_at(2))
    predict_raster(other, source, target, tile=64)
    with rasterio.open(target) as file:
        labels = file.read(1)
    assert differing(labels, other, picture) < 1e-3 < 0.1 < differing(labels, model, picture)


def test_windows_leave_pixels_without_data(model, tmp_path):
    bands = scene(64, 96).transpose(2, 0, 1).copy()
    bands[:, :20, :30] = 7
    source = write_raster(tmp_path / 'in.tif', bands, photometric='rgb', nodata=7)
    predict_raster(model, source, tmp_path / 'out.tif', windows=48)
    with rasterio.open(tmp_path / 'out.tif') as file:
        assert ((file.read(1) == 255) == (bands == 7).all(0)).all()


@pytest.mark.parametrize(
    'arguments, reason',
    [
        (dict(windows=64, tile=64), 'tile is what the head takes'),
        (dict(overlap=16), 'overlap and batch_size need windows'),
        (dict(batch_size=2), 'overlap and batch_size need windows'),
        (dict(windows=64, overlap=64), r'less than their side \(64\), got 64'),
        (dict(windows=0), 'must be positive, got 0 and 1'),
        (dict(windows=64, batch_size=0), 'must be positive, got 64 and 0'),
    ],
)
def test_arguments_of_the_other_way_are_refused(model, tmp_path, arguments, reason):
    with pytest.raises(UserError, match=reason):
        predict_raster(model, tmp_path / 'in.tif', tmp_path / 'out.tif', **arguments)


def test_without_rasterio_its_extra_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setattr('mmvim.apis.rasters.find_spec', lambda name: None)
    with pytest.raises(UserError, match=r'\[geo\]'):
        predict_raster(model, tmp_path / 'in.tif', tmp_path / 'out.tif')
