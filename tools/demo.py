"""The main job on generated data: make the data, train a small model, test it, save pictures.

``make demo`` runs this for segmentation, ``make demo-det`` for detection. Every step is a command
line of this project, printed before it runs, and works the same on real data with another config.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple


class Task(NamedTuple):
    """A demo: its config, where its data goes and in which format, and what sums its test up."""

    config: str
    data: Path
    data_format: str
    annotations: str | None  # the file of the val split that the evaluator reads itself
    work_dir: Path
    metrics: dict[str, tuple[str, float]]  # key in the log: name, and factor to percent


TASKS = {
    'segmentation': Task(
        config='configs/vim/vim-demo_upernet_shapes-128x128.py',
        data=Path('data/shapes'),
        data_format='ade20k',
        annotations=None,
        work_dir=Path('work_dirs/demo'),
        metrics={'mIoU': ('mIoU', 1)},
    ),
    'detection': Task(
        config='configs/vim/vim-demo_cascade-mask-rcnn_shapes-128x128.py',
        data=Path('data/shapes-coco'),
        data_format='coco',
        annotations='annotations/instances_val.json',
        work_dir=Path('work_dirs/demo-det'),
        metrics={'coco/bbox_mAP': ('box AP', 100), 'coco/segm_mAP': ('mask AP', 100)},
    ),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--task', choices=TASKS, default='segmentation', help='default: %(default)s'
    )
    parser.add_argument('--work-dir', type=Path, help='default: work_dirs/demo or demo-det')
    parser.add_argument('--data', type=Path, help='default: data/shapes or data/shapes-coco')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        default=[],
        metavar='KEY=VALUE',
        help='settings of the config to change for training and testing',
    )
    return parser.parse_args()


def step(number: int, title: str, *command: str) -> None:
    """Run a tool and show the command; stop the demo with its exit code if it fails."""
    print(f'\n[{number}/3] {title}\n      python {shlex.join(command)}\n', flush=True)
    code = subprocess.call([sys.executable, *command], cwd=Path(__file__).parents[1])
    if code:
        sys.exit(f'demo: step {number} ({title}) failed with exit code {code}, see above')


def main() -> None:
    args = parse_args()
    start = time.monotonic()
    task = TASKS[args.task]
    # The tools run from the root of the repository, the user's paths count from here.
    work_dir = (args.work_dir or task.work_dir).absolute()
    data = (args.data or task.data).absolute()
    settings = [f'{name}_dataloader.dataset.data_root={data}' for name in ('train', 'val', 'test')]
    if task.annotations is not None:
        path = data / task.annotations
        settings += [f'{name}_evaluator.ann_file={path}' for name in ('val', 'test')]
    options = ['--cfg-options', *settings, *args.cfg_options]
    make = ['tools/dataset_tools/make_shapes.py', '--format', task.data_format, str(data)]
    step(1, 'generate the data', *make)
    step(2, 'train', 'tools/train.py', task.config, '--work-dir', str(work_dir), *options)

    checkpoint = Path((work_dir / 'last_checkpoint').read_text().strip())
    test_dir, pictures = work_dir / 'test', work_dir / 'pictures'
    test = ['tools/test.py', task.config, str(checkpoint), '--work-dir', str(test_dir)]
    step(3, 'test on images not seen in training', *test, '--show-dir', str(pictures), *options)

    metrics = json.loads(max(test_dir.glob('*/*.json')).read_text().splitlines()[-1])
    summary = ', '.join(
        f'{name} {factor * metrics[key]:.1f}' for key, (name, factor) in task.metrics.items()
    )
    print(f'\n{summary} on the held-out images (table above)')
    print(f'pictures    {pictures}  (left: ground truth, right: prediction)')
    print(f'checkpoint  {checkpoint}')
    print(f'took        {time.monotonic() - start:.0f} s')


if __name__ == '__main__':
    main()
