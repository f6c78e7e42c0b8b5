"""Generated maps of fields whose classes cannot be told nearby.

The ground is seen in swaths, as if flown over from left to right. What grows on a field shows in
its texture, and the season does not: a mark at the left end of the swath has it in its colour. So
the class of a field, crop and season, takes a look as far as the map is wide.
Needs numpy and OpenCV only; a raster needs rasterio.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

CLASSES = ('ground', 'spring wheat', 'spring beet', 'autumn wheat', 'autumn beet')
PALETTE = [[120, 120, 120], [250, 215, 60], [60, 160, 75], [200, 70, 40], [90, 60, 190]]  # RGB
MARK = 64  # its width in pixels
_MARKS = ((210, 50, 40), (40, 70, 215))  # of spring and autumn
_GROUND = (150, 140, 125)
_SWATH = (96, 320)  # heights
_FIELD = (96, 320)  # widths
_HEDGE = 8


def draw_swaths(
    rng: np.random.Generator, height: int, width: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Draw a map one swath after the other.

    Args:
        rng (np.random.Generator): The only source of randomness.
        height, width (int): Of the map, in pixels.

    Yields:
        tuple[int, np.ndarray, np.ndarray]: The first row; pixels (h, width, 3) of uint8, RGB; and
        labels (h, width) of uint8.
    """
    top = 0
    while top < height:
        rows = min(int(rng.integers(*_SWATH)), height - top)
        yield top, *_draw_swath(rng, rows, width, season=int(rng.integers(2)))
        top += rows


def draw_map(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """All of :func:`draw_swaths`: pixels (height, width, 3) and labels (height, width)."""
    _, pixels, labels = zip(*draw_swaths(rng, height, width), strict=True)
    return np.concatenate(pixels), np.concatenate(labels)


def write_pictures(root: Path, split: str, count: int, size: tuple[int, int], seed: int) -> None:
    """Write ``images/SPLIT/*.png`` and ``annotations/SPLIT/*.png``, whose values are classes.

    Picture ``k`` depends on the seed, the size and ``k`` alone.

    Raises:
        FileExistsError: There is such a split already.
    """
    for folder in ('images', 'annotations'):
        (root / folder / split).mkdir(parents=True)
    for index in range(count):
        pixels, labels = draw_map(np.random.default_rng([seed, index]), *size)
        cv2.imwrite(str(root / 'images' / split / f'{index:06d}.png'), pixels[..., ::-1])
        cv2.imwrite(str(root / 'annotations' / split / f'{index:06d}.png'), labels)


def write_raster(
    picture: Path, labels: Path, size: tuple[int, int], seed: int
) -> Iterator[tuple[int, int]]:
    """Write a map of any size and its labels as GeoTIFFs.

    Yields:
        tuple[int, int]: Rows that are done, and all.
    """
    import rasterio
    from rasterio.transform import from_origin
    from rasterio.windows import Window

    profile = dict(
        driver='GTiff',
        height=size[0],
        width=size[1],
        dtype='uint8',
        crs='EPSG:32633',
        transform=from_origin(500_000, 5_000_000, 0.5, 0.5),
        tiled=True,
        blockxsize=256,
        blockysize=256,
        compress='deflate',
        bigtiff='if_safer',
    )
    with (
        rasterio.open(picture, 'w', count=3, photometric='rgb', **profile) as pixels_file,
        rasterio.open(labels, 'w', count=1, **profile) as labels_file,
    ):
        labels_file.write_colormap(1, {k: (*colour, 255) for k, colour in enumerate(PALETTE)})
        for top, pixels, values in draw_swaths(np.random.default_rng([seed]), *size):
            window = Window(0, top, size[1], len(values))
            pixels_file.write(pixels.transpose(2, 0, 1), window=window)
            labels_file.write(values, 1, window=window)
            yield top + len(values), size[0]


def _draw_swath(rng, height: int, width: int, season: int) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.empty((height, width, 3), np.uint8)
    labels = np.zeros((height, width), np.uint8)
    pixels[:] = _GROUND
    pixels[:, :MARK] = _MARKS[season]
    left = MARK + _HEDGE
    while left < width:
        right = min(left + int(rng.integers(*_FIELD)), width)
        middle = int(rng.integers(height // 3, 2 * height // 3 + 1)) if height > _SWATH[0] else 0
        for top, bottom in ((0, middle), (middle, height)):
            place = slice(top + _HEDGE, bottom), slice(left, right - _HEDGE)
            if labels[place].size:
                crop = int(rng.integers(2))
                pixels[place] = _paint(rng, labels[place].shape, crop)
                labels[place] = 1 + 2 * season + crop
        left = right
    noise = rng.integers(-12, 13, (height, width, 1), np.int16)
    return (pixels + noise).clip(0, 255).astype(np.uint8), labels


def _paint(rng, size: tuple[int, ...], crop: int) -> np.ndarray:
    """Rows of wheat or dots of beet, (height, width, 3), in colours that tell nothing."""
    angle, period = rng.uniform(0, np.pi), rng.uniform(8, 14)
    y, x = np.ogrid[: size[0], : size[1]]
    x, y = x.astype(np.float32), y.astype(np.float32)
    u = (x * np.cos(angle) + y * np.sin(angle)) * (2 * np.pi / period)
    wave = np.sin(u)
    if crop:
        wave = 2 * wave * np.sin((y * np.cos(angle) - x * np.sin(angle)) * (2 * np.pi / period))
    mix = (0.5 + 0.5 * wave.clip(-1, 1))[..., None].astype(np.float32)
    dark = np.array([rng.uniform(60, 120), rng.uniform(80, 130), rng.uniform(30, 70)], np.float32)
    return dark + mix * rng.uniform(50, 90)
