"""Generated maps whose classes depend on marks that are far away."""

import importlib.util

import cv2
import numpy as np
import pytest

from mmvim.datasets.swaths import CLASSES, MARK, draw_map, draw_swaths, write_pictures, write_raster


def test_a_field_has_the_season_of_its_mark():
    seasons = set()
    for _, pixels, labels in draw_swaths(np.random.default_rng(0), 2000, 900):
        red, _, blue = pixels[:, :MARK].reshape(-1, 3).mean(0)
        spring = red > blue
        found = set(np.unique(labels)) - {0}
        assert found and found <= ({1, 2} if spring else {3, 4})
        seasons.add(bool(spring))
    assert seasons == {True, False}


def test_only_the_mark_shows_the_season():
    """Fields of both seasons come from the same numbers: nothing but the mark differs."""
    pictures = {}
    for seed in range(20):
        pixels, labels = draw_map(np.random.default_rng(seed), 90, 600)
        spring = labels.max() < 3
        pictures.setdefault(bool(spring), []).append(pixels[:, MARK:].reshape(-1, 3).mean(0))
    spring, autumn = (np.mean(pictures[key], 0) for key in (True, False))
    spread = np.std(pictures[True] + pictures[False], 0)
    assert (abs(spring - autumn) < spread).all()


def test_pictures_are_the_same_for_a_seed_and_differ_between_splits(tmp_path):
    for folder in ('one', 'two'):
        write_pictures(tmp_path / folder, 'training', 2, (64, 256), 0)
    write_pictures(tmp_path / 'one', 'validation', 2, (64, 256), 1)
    files = sorted(path.name for path in (tmp_path / 'one/images/training').iterdir())
    assert files == ['000000.png', '000001.png']
    read = [
        cv2.imread(str(tmp_path / place / '000001.png'))
        for place in ('one/images/training', 'two/images/training', 'one/images/validation')
    ]
    assert (read[0] == read[1]).all() and (read[0] != read[2]).any()
    labels = cv2.imread(str(tmp_path / 'one/annotations/training/000001.png'), 0)
    assert labels.shape == (64, 256) and 0 < labels.max() < len(CLASSES)


@pytest.mark.skipif(
    importlib.util.find_spec('rasterio') is None, reason="rasterio (the extra 'geo') is missing"
)
def test_a_raster_is_the_map_that_is_drawn(tmp_path):
    import rasterio

    files = tmp_path / 'map.tif', tmp_path / 'labels.tif'
    done = list(write_raster(*files, (700, 500), seed=3))
    assert done[-1] == (700, 700)
    pixels, labels = draw_map(np.random.default_rng([3]), 700, 500)
    with rasterio.open(files[0]) as first, rasterio.open(files[1]) as second:
        assert (first.read().transpose(1, 2, 0) == pixels).all()
        assert (second.read(1) == labels).all() and first.transform == second.transform
