"""How much of label maps is right, from left to right, and a picture of them side by side.

``compare_maps.py raster.tif raster-labels.tif whole.tif windows.tif --picture maps.jpg``
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

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
    return parser.parse_args()


def accuracies(truth, maps, parts: int, ignore: int) -> np.ndarray:
    """Share of right pixels, (parts, maps), without those whose true label is ignored."""
    from rasterio.windows import Window

    right, count = np.zeros((parts, len(maps))), np.zeros((parts, 1))
    edges = [k * truth.width // parts for k in range(parts + 1)]
    for top in range(0, truth.height, STRIP):
        window = Window(0, top, truth.width, min(STRIP, truth.height - top))
        expected = truth.read(1, window=window)
        counts = expected != ignore
        equal = [(file.read(1, window=window) == expected) & counts for file in maps]
        for part in range(parts):
            columns = slice(edges[part], edges[part + 1])
            count[part] += counts[:, columns].sum()
            right[part] += [x[:, columns].sum() for x in equal]
    return np.vstack([right / count, right.sum(0) / count.sum()])


def panel(file, side: int) -> np.ndarray:
    """A small picture (h, side, 3) of a raster or a label map."""
    size = max(1, round(side * file.height / file.width)), side
    if file.count > 1:
        return file.read([1, 2, 3], out_shape=(3, *size)).transpose(1, 2, 0)
    palette = file.colormap(1)
    colours = np.array([palette[k][:3] for k in range(256)], np.uint8)
    return colours[file.read(1, out_shape=size)]


def main() -> None:
    import rasterio

    args = parse_args()
    files = [rasterio.open(path) for path in (args.raster, args.truth, *args.maps)]
    _, truth, *maps = files
    print('| part of the width |', *(f'{path} |' for path in args.maps))
    print('| --- |', *('---: |' for _ in maps))
    rows = accuracies(truth, maps, args.parts, args.ignore)
    names = [*(f'{k + 1} of {args.parts}' for k in range(args.parts)), 'all']
    for name, row in zip(names, rows, strict=True):
        print(f'| {name} |', *(f'{100 * value:.1f} |' for value in row))
    if args.picture:
        panels = [panel(file, args.side) for file in files]
        gap = np.full((len(panels[0]), 8, 3), 255, np.uint8)
        joined = np.hstack([part for one in panels for part in (gap, one)][1:])
        Image.fromarray(joined).save(args.picture, quality=80)


if __name__ == '__main__':
    main()
