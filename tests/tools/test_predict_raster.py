"""``tools/predict.py --raster`` on a folder with GeoTIFFs."""

import csv
import importlib.util

import numpy as np
import pytest
from command_line import passed, tool
from PIL import Image
from tiny_models import SEGMENTOR, scene, write_checkpoint, write_config

from mmvim.apis import load_model, predict, predict_raster
from mmvim.datasets.shapes import CLASSES, PALETTE, draw_scene

if importlib.util.find_spec('rasterio') is None:
    pytest.skip("rasterio (the extra 'geo') is not installed", allow_module_level=True)

import rasterio
from rasterio.transform import from_origin

PLACE = dict(crs='EPSG:32633', transform=from_origin(500_000, 5_000_000, 0.5, 0.5))


def test_the_command_writes_label_maps_with_their_place(tmp_path):
    config = write_config(tmp_path / 'config.py', SEGMENTOR)
    files = config, write_checkpoint(tmp_path / 'weights.pth', config)
    picture = draw_scene(np.random.default_rng(0), 160).image[:128, :, ::-1].copy()
    folder = tmp_path / 'flights'
    folder.mkdir()
    profile = dict(driver='GTiff', count=3, height=128, width=160, dtype='uint8', **PLACE)
    with rasterio.open(folder / 'field.tif', 'w', photometric='rgb', **profile) as file:
        file.write(picture.transpose(2, 0, 1))
    Image.fromarray(picture).save(folder / 'photo.png')
    (folder / 'broken.tif').write_bytes((folder / 'field.tif').read_bytes()[:100])
    arguments = folder, '--raster', '--tile', 64, '--device', 'cpu', '--out-dir', 'out'
    printed = passed(tool('predict.py', *files, *map(str, arguments), cwd=tmp_path))
    assert 'predicted 1' in printed and 'skipped 2' in printed
    with rasterio.open(tmp_path / 'out/labels/field.tif') as file:
        assert file.crs == rasterio.CRS.from_string(PLACE['crs'])
        assert file.transform == PLACE['transform']
        assert file.dtypes == ('uint8',) and file.nodata is None
        assert [file.colormap(1)[k][:3] for k in range(len(PALETTE))] == list(map(tuple, PALETTE))
        (sample,) = predict(load_model(*files, device='cpu'), picture)
        assert (file.read(1) != sample.pred_sem_seg.data[0].numpy()).mean() < 1e-3
    with Image.open(tmp_path / 'out/pictures/field.jpg') as image:
        assert image.size == (160, 128)
    with open(tmp_path / 'out/labels.csv', newline='') as file:
        assert [row['class'] for row in csv.DictReader(file)] == list(CLASSES)
    assert not list((tmp_path / 'out/labels').glob('*.parts'))


def test_windows_are_predicted_as_by_the_function(tmp_path, command):
    config = write_config(tmp_path / 'config.py', SEGMENTOR)
    files = config, write_checkpoint(tmp_path / 'weights.pth', config)
    source, expected = tmp_path / 'field.tif', tmp_path / 'expected.tif'
    profile = dict(driver='GTiff', count=3, height=90, width=140, dtype='uint8', **PLACE)
    with rasterio.open(source, 'w', photometric='rgb', **profile) as file:
        file.write(scene(90, 140).transpose(2, 0, 1))
    options = '--raster --windows 64 --overlap 16 --batch-size 2 --device cpu --no-pictures'
    assert 'predicted 1' in command(*files, source, *options.split())
    model = load_model(*files, device='cpu')
    predict_raster(model, source, expected, windows=64, overlap=16, batch_size=2)
    with (
        rasterio.open(tmp_path / 'predictions/labels/field.tif') as file,
        rasterio.open(expected) as other,
    ):
        assert file.transform == PLACE['transform']
        assert (file.read(1) == other.read(1)).mean() > 0.999
