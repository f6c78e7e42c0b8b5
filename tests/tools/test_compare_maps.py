"""The tools of the demonstration that large rasters need all of their context."""

import importlib.util

import pytest
from command_line import passed, refused, tool
from PIL import Image

if importlib.util.find_spec('rasterio') is None:
    pytest.skip("rasterio (the extra 'geo') is not installed", allow_module_level=True)


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
