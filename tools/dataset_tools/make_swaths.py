"""Generate maps of fields whose classes depend on marks as far away as the map is wide.

Pictures to train on (``images/``, ``annotations/``), or with ``--raster`` one GeoTIFF of any size
and its labels.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from mmvim.datasets.swaths import write_pictures, write_raster


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('out', type=Path, help='folder')
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        default=(128, 4096),
        help='of a picture or the raster (default: 128 4096)',
    )
    parser.add_argument('--train', type=int, default=200, help='pictures (default: %(default)s)')
    parser.add_argument('--val', type=int, default=20, help='pictures (default: %(default)s)')
    parser.add_argument(
        '--raster',
        metavar='NAME',
        help='write NAME.tif and NAME-labels.tif instead; needs rasterio (the extra geo)',
    )
    parser.add_argument('--seed', type=int, default=0, help='default: %(default)s')
    args = parser.parse_args()
    for name, least in (('size', 1), ('train', 1), ('val', 1), ('seed', 0)):
        value = getattr(args, name)
        if (min(value) if name == 'size' else value) < least:
            parser.error(f'--{name} must be at least {least}, got {value}')
    if args.raster and find_spec('rasterio') is None:
        parser.error("--raster needs rasterio: pip install '.[geo]' installs it")
    return args


def main() -> None:
    args = parse_args()
    size = tuple(args.size)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.raster is None:
        try:
            write_pictures(args.out, 'training', args.train, size, 2 * args.seed)
            write_pictures(args.out, 'validation', args.val, size, 2 * args.seed + 1)
        except FileExistsError as error:
            sys.exit(f'make_swaths: there are pictures already: {error.filename}')
        print(f'Wrote {args.train} + {args.val} pictures into {args.out}')
        return
    picture = args.out / f'{args.raster}.tif'
    labels = args.out / f'{args.raster}-labels.tif'
    for done, rows in write_raster(picture, labels, size, args.seed):
        if sys.stderr.isatty():
            print(f'\r{done} of {rows} rows', end='', file=sys.stderr)
    print(f'Wrote {picture} and {labels}')


if __name__ == '__main__':
    main()
