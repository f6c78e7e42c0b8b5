"""Generate the shapes data set: textured shapes of six classes on textured ground."""

import argparse
import sys

from mmengine.utils import track_iter_progress

from mmvim.datasets.shapes import CLASSES, PALETTES, SPLITS, read_meta, write_ade20k, write_coco

WRITERS = {'ade20k': write_ade20k, 'coco': write_coco}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('out', help='folder to create')
    parser.add_argument(
        '--format',
        choices=WRITERS,
        default='ade20k',
        help='ade20k: semantic maps; coco: instance masks and boxes (default: %(default)s)',
    )
    parser.add_argument('--size', type=int, default=128, help='image side (default: %(default)s)')
    parser.add_argument('--train', type=int, default=240, help='images (default: %(default)s)')
    parser.add_argument('--val', type=int, default=40, help='images (default: %(default)s)')
    parser.add_argument(
        '--palette',
        choices=PALETTES,
        default='class',
        help='class: hues of its own for every class; paired: two outlines share their hues, and '
        'colour cannot tell them apart (default: %(default)s)',
    )
    parser.add_argument('--seed', type=int, default=0, help='default: %(default)s')
    parser.add_argument(
        '--overwrite', action='store_true', help='replace shapes made with other arguments'
    )
    return parser.parse_args()


def main() -> None:
    args = vars(parse_args())
    out, layout = args['out'], args.pop('format')
    # The bar redraws itself, which only a terminal shows as meant.
    progress = track_iter_progress if sys.stdout.isatty() else iter
    try:
        written = WRITERS[layout](args.pop('out'), **args, progress=progress)
    except (ValueError, OSError) as error:
        sys.exit(f'make_shapes: {error}')
    print(f'{"Wrote" if written else "Nothing to do, the same shapes are already in"} {out}')

    pixels = read_meta(out)['pixels']
    print('share of pixels', *(f'{split:>8}' for split in SPLITS))
    for value, name in enumerate(['(unlabelled)', *CLASSES]):
        shares = (100 * pixels[split][value] / sum(pixels[split]) for split in SPLITS)
        print(f'{name:15}', *(f'{share:6.1f} %' for share in shares))


if __name__ == '__main__':
    main()
