"""The tools of the demonstration that large rasters need all of their context."""

import importlib.util

import numpy as np
import pytest
from command_line import passed, refused, tool
from PIL import Image

if importlib.util.find_spec('rasterio') is None:
    pytest.skip("rasterio (the extra 'geo') is not installed", allow_module_level=True)

import rasterio


@pytest.mark.slow
def test_a_raster_is_made_and_maps_of_it_are_compared(tmp_path):
    make = 'dataset_tools/make_swaths.py', 'data'
    passed(tool(*make, '--train', '2', '--val', '1', '--size', '64', '256', cwd=tmp_path))
    assert len(list((tmp_path / 'data/images').rglob('*.png'))) == 3
    assert 'pictures already' in refused(tool(*make, '--size', '64', '256', cwd=tmp_path))
    passed(tool(*make, '--raster', 'map', '--size', '300', '500', cwd=tmp_path))
    passed(tool(*make, '--raster', 'other', '--size', '300', '500', '--seed', '1', cwd=tmp_path))
    maps = [f'data/{name}.tif' for name in ('map', 'map-labels', 'map-labels', 'other-labels')]
    options = '--picture', 'maps.jpg', '--side', '100', '--parts', '2'
    printed = passed(tool('analysis_tools/compare_maps.py', *maps, *options, cwd=tmp_path))
    (row,) = (line.split('|') for line in printed.splitlines() if line.startswith('| all'))
    assert float(row[2]) == 100 and 0 < float(row[3]) < 100
    with Image.open(tmp_path / 'maps.jpg') as picture:
        assert picture.size == (4 * 100 + 3 * 8, 60)


@pytest.fixture(scope='module')
def maps(tmp_path_factory):
    """A raster, label maps of its size and of another, and files that are neither."""
    folder = tmp_path_factory.mktemp('maps')

    def write(name: str, pixels: np.ndarray, palette: dict | None = None) -> bytes:
        count, height, width = pixels.shape
        profile = dict(count=count, height=height, width=width, dtype=pixels.dtype)
        with rasterio.open(folder / name, 'w', driver='GTiff', **profile) as file:
            file.write(pixels)
            if palette is not None:
                file.write_colormap(1, palette)
        return (folder / name).read_bytes()

    ones, red = np.ones((1, 30, 40), np.uint8), {1: (255, 0, 0, 255)}
    write('map.tif', ones.repeat(3, 0))
    write('deep.tif', ones.repeat(3, 0).astype(np.uint16))
    write('plain.tif', ones)
    write('high.tif', np.ones((1, 31, 40), np.uint8), red)
    content = write('labels.tif', ones, red)
    (folder / 'headless.tif').write_bytes(content[:100])
    content = write('long.tif', np.ones((1, 3000, 40), np.uint8))
    (folder / 'cut.tif').write_bytes(content[: len(content) // 2])
    return folder


PICTURE = '--picture', 'out.jpg'


@pytest.mark.parametrize(
    'arguments, reason',
    [
        (['map.tif', 'none.tif', 'labels.tif'], 'none.tif: broken, or no raster'),
        (['map.tif', 'labels.tif', 'headless.tif'], 'headless.tif: broken, or no raster'),
        (['long.tif', 'long.tif', 'cut.tif'], 'cut.tif: broken, or no raster'),
        (['map.tif', 'labels.tif', '.'], '.: broken, or no raster'),
        (['map.tif', 'labels.tif', 'high.tif'], 'high.tif has 40 x 31 pixels, labels.tif 40 x 30'),
        (['high.tif', 'labels.tif', 'labels.tif'], 'high.tif has 40 x 31 pixels, labels.tif 40 x'),
        (['map.tif', 'labels.tif', 'map.tif'], 'map.tif: a label map has one band, got 3'),
        (['map.tif', 'labels.tif', 'labels.tif', '--ignore', '1'], 'labels.tif: all of it has the'),
        (['map.tif', 'labels.tif', 'plain.tif', *PICTURE], 'plain.tif: it has no palette'),
        (['deep.tif', 'labels.tif', 'labels.tif', *PICTURE], 'deep.tif: its samples must be uint8'),
        (['map.tif', 'labels.tif', 'labels.tif', '--picture', 'out.txt'], 'out.txt: cannot be wri'),
        (['map.tif', 'labels.tif', 'labels.tif', '--parts', '0'], '--parts must be from 1 to'),
        (['map.tif', 'labels.tif', 'labels.tif', '--parts', '41'], '--parts must be from 1 to'),
        (['map.tif', 'labels.tif', 'labels.tif', '--side', '0'], '--side must be positive, got 0'),
    ],
)
def test_what_cannot_be_compared_is_named_in_one_line(maps, arguments, reason):
    message = refused(tool('analysis_tools/compare_maps.py', *arguments, cwd=maps))
    assert message.startswith('compare_maps.py: ') and reason in message
