"""How much of label maps is right, from left to right, and a picture of them side by side.

``compare_maps.py raster.tif raster-labels.tif whole.tif windows.tif --picture maps.jpg``
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from mmvim.apis.rasters import require_rasterio
from mmvim.utils.launch import UserError, run

STRIP = 1024  # rows that are read at a time


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('raster', type=Path, help='what was predicted')
    parser.add_argument('truth', type=Path, help='its labels')
    parser.add_argument('maps', nargs='+', type=Path, help='label maps with a palette')
    parser.add_argument('--parts', type=int, default=4, help='of the width (default: %(default)s)')
    parser.add_argument('--ignore', type=int, default=0, help='label (default: %(default)s)')
    parser.add_argument('--picture', type=Path, help='file to write')
    parser.add_argument('--side', type=int, default=400, help='of each (default: %(default)s)')
    args = parser.parse_args()
    if args.side < 1:
        parser.error(f'--side must be positive, got {args.side}')
    return args


@contextmanager
def naming(file: str | Path) -> Iterator[None]:
    """Name the file with which rasterio fails."""
    from rasterio.errors import RasterioError

    try:
        yield
    except RasterioError as error:
        raise UserError(f'{file}: broken, or no raster ({error})') from None


def open_raster(path: Path):
    import rasterio

    with naming(path):
        return rasterio.open(path)


def read(file, *args, **arguments) -> np.ndarray:
    """What ``file.read`` gives."""
    with naming(file.name):
        return file.read(*args, **arguments)


def check(raster, truth, maps) -> None:
    """Raise unless labels can be compared pixel by pixel."""
    for file in (raster, *maps):
        if file.shape != truth.shape:
            raise UserError(
                f'{file.name} has {file.width} x {file.height} pixels, '
                f'{truth.name} {truth.width} x {truth.height}'
            )
    for file in (truth, *maps):
        if file.count != 1:
            raise UserError(f'{file.name}: a label map has one band, got {file.count}')


def accuracies(truth, maps, parts: int, ignore: int) -> np.ndarray:
    """Share of right pixels, (parts, maps), without those whose true label is ignored."""
    from rasterio.windows import Window

    right, count = np.zeros((parts, len(maps))), np.zeros((parts, 1))
    edges = [k * truth.width // parts for k in range(parts + 1)]
    for top in range(0, truth.height, STRIP):
        window = Window(0, top, truth.width, min(STRIP, truth.height - top))
        expected = read(truth, 1, window=window)
        counts = expected != ignore
        equal = [(read(file, 1, window=window) == expected) & counts for file in maps]
        for part in range(parts):
            columns = slice(edges[part], edges[part + 1])
            count[part] += counts[:, columns].sum()
            right[part] += [x[:, columns].sum() for x in equal]
    if not count.any():
        raise UserError(f'{truth.name}: all of it has the label {ignore}, which is ignored')
    return np.vstack([right / count, right.sum(0) / count.sum()])


def panel(file, side: int) -> np.ndarray:
    """A small picture (h, side, 3) of a raster or a label map."""
    size = max(1, round(side * file.height / file.width)), side
    if set(file.dtypes) != {'uint8'}:
        raise UserError(f'{file.name}: its samples must be uint8, got {file.dtypes[0]}')
    if file.count > 2:
        return read(file, [1, 2, 3], out_shape=(3, *size)).transpose(1, 2, 0)
    try:
        palette = file.colormap(1)
    except ValueError:
        raise UserError(f'{file.name}: it has no palette, and no three bands') from None
    colours = np.array([palette[k][:3] for k in range(256)], np.uint8)
    return colours[read(file, 1, out_shape=size)]


def main() -> None:
    args = parse_args()
    require_rasterio()
    files = [open_raster(path) for path in (args.raster, args.truth, *args.maps)]
    raster, truth, *maps = files
    check(raster, truth, maps)
    if not 1 <= args.parts <= truth.width:
        raise UserError(f'--parts must be from 1 to the width, {truth.width}, got {args.parts}')
    rows = accuracies(truth, maps, args.parts, args.ignore)
    panels = [panel(file, args.side) for file in files] if args.picture else []
    print('| part of the width |', *(f'{path} |' for path in args.maps))
    print('| --- |', *('---: |' for _ in maps))
    names = [*(f'{k + 1} of {args.parts}' for k in range(args.parts)), 'all']
    for name, row in zip(names, rows, strict=True):
        print(f'| {name} |', *(f'{100 * value:.1f} |' for value in row))
    if args.picture:
        gap = np.full((len(panels[0]), 8, 3), 255, np.uint8)
        joined = np.hstack([part for one in panels for part in (gap, one)][1:])
        try:
            Image.fromarray(joined).save(args.picture, quality=80)
        except (OSError, ValueError) as error:
            raise UserError(f'{args.picture}: cannot be written ({error})') from None


if __name__ == '__main__':
    run(main)
