"""Train one config for every direction of the scan and several seeds; tabulate the mIoU.

Finished runs are kept in the work dir and not repeated, stopped ones are resumed; ``table.md`` and
``results.json`` there hold what there is. A seed gives every direction the same images in the same
order.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from mmengine.config import Config

from mmvim.comparison.runs import about, call, read_result, scalars, write_result
from mmvim.datasets.shapes import CLASSES, write_ade20k
from mmvim.models.directions import DIRECTIONS
from mmvim.utils.launch import UserError, run

ROOT = Path(__file__).parents[2]
CONFIG = 'configs/vim/vim-demo_linear_paired-shapes-96x96.py'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--work-dir',
        type=Path,
        default=Path('work_dirs/ablate_directions'),
        help='default: %(default)s',
    )
    parser.add_argument(
        '--data',
        type=Path,
        default=Path('data/paired-shapes'),
        help='generated here if it is not there (default: %(default)s)',
    )
    parser.add_argument('--train', type=int, default=1000, help='images (default: %(default)s)')
    parser.add_argument('--val', type=int, default=200, help='images (default: %(default)s)')
    names = tuple(DIRECTIONS)
    parser.add_argument('--directions', nargs='+', choices=names, default=names)
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument(
        '--max-runs', type=int, help='stop after so many runs; the next call goes on from there'
    )
    parser.add_argument(
        '--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='for every run'
    )
    return parser.parse_args()


def train(work_dir: Path, options: list[str]) -> dict:
    """Train in ``work_dir``, from its last checkpoint if there is one."""
    work_dir.mkdir(parents=True, exist_ok=True)
    command = ['tools/train.py', CONFIG, '--work-dir', str(work_dir), '--resume']
    call([*command, '--cfg-options', *options], work_dir / 'train.log', ROOT)
    metrics = {key: list(scalars(work_dir, key).values())[-1] for key in ('mIoU', 'aAcc')}
    return write_result(work_dir, options, **metrics)


def colour_alone(data: Path, bins: int = 32, blur: float = 1.5) -> float:
    """mIoU of naming each pixel after the most frequent class of its blurred colour.

    What a table is to be read against: shapes that colour tells apart need no scan.
    """

    def pixels(split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for path in sorted((data / 'annotations' / split).glob('*.png')):
            labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)  # (H, W), 0 is unlabelled
            image = cv2.imread(str(data / 'images' / split / f'{path.stem}.jpg'))
            cells = cv2.GaussianBlur(image, (0, 0), blur).astype(int) * bins // 256  # (H, W, 3)
            colour = cells @ (bins**2, bins, 1)  # (H, W)
            yield colour[labels > 0], labels[labels > 0].astype(int) - 1

    seen = np.zeros((bins**3, len(CLASSES)))
    for colour, label in pixels('training'):
        np.add.at(seen, (colour, label), 1)
    confusion = np.zeros((len(CLASSES), len(CLASSES)))
    for colour, label in pixels('validation'):
        np.add.at(confusion, (label, seen[colour].argmax(axis=1)), 1)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - confusion.diagonal()
    return 100 * float((confusion.diagonal() / np.maximum(union, 1)).mean())


def table(results: dict[str, dict[int, dict]], seeds: list[int], colour: float) -> str:
    """Markdown: one row per direction, its mIoU per seed, their mean and standard deviation."""
    lines = [
        f'| directions | {" | ".join(f"seed {seed}" for seed in seeds)} | mean | spread |',
        '| --- |' + ' ---: |' * (len(seeds) + 2),
    ]
    for direction, runs in results.items():
        found = [runs[seed]['mIoU'] for seed in seeds if seed in runs]
        cells = [f'{runs[seed]["mIoU"]:.1f}' if seed in runs else '' for seed in seeds]
        cells.append(f'{statistics.mean(found):.1f}' if found else '')
        cells.append(f'{statistics.stdev(found):.1f}' if len(found) > 1 else '')
        lines.append(f'| `{direction}` | {" | ".join(cells)} |')
    lines.append(f'| colour alone |{" |" * len(seeds)} {colour:.1f} | |')
    return '\n'.join(lines) + '\n'


def main() -> None:
    args = parse_args()
    work_dir, data = args.work_dir.absolute(), args.data.absolute()
    size = Config.fromfile(ROOT / CONFIG).model.data_preprocessor.size[0]
    try:
        write_ade20k(data, train=args.train, val=args.val, size=size, palette='paired')
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from None
    common = [f'{name}_dataloader.dataset.data_root={data}' for name in ('train', 'val', 'test')]
    common += args.cfg_options

    results: dict[str, dict[int, dict]] = {direction: {} for direction in args.directions}
    left = len(args.seeds) * len(args.directions) if args.max_runs is None else args.max_runs
    # Seed by seed, so that a table that is not complete compares all directions.
    for seed, direction in ((s, d) for s in args.seeds for d in args.directions):
        run_dir = work_dir / f'{direction}_seed{seed}'
        options = [f'model.backbone.directions={direction}', f'randomness.seed={seed}', *common]
        result = read_result(run_dir, options)
        if result is None and left:
            left -= 1
            result = train(run_dir, options)
            print(f'mIoU {result["mIoU"]:.1f}', flush=True)
        if result is not None:
            results[direction][seed] = result

    colour = colour_alone(data)
    markdown = table(results, args.seeds, colour)
    work_dir.mkdir(parents=True, exist_ok=True)
    (work_dir / 'table.md').write_text(markdown)
    content = dict(config=CONFIG, **about(), colour_alone=colour, runs=results)
    (work_dir / 'results.json').write_text(json.dumps(content, indent=2) + '\n')
    done = sum(map(len, results.values()))
    print(f'\n{markdown}\n{done} of {len(args.seeds) * len(args.directions)} runs; {work_dir}')


if __name__ == '__main__':
    run(main)
