"""The main job on generated data: make the data, train a small model, test it, save pictures.

``make demo`` runs this. Every step is a command line of this project, printed before it runs, and
works the same on real data with another config.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

CONFIG = 'configs/vim/vim-demo_upernet_shapes-128x128.py'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--work-dir', type=Path, default=Path('work_dirs/demo'), help='default: %(default)s'
    )
    parser.add_argument(
        '--data', type=Path, default=Path('data/shapes'), help='default: %(default)s'
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
    # The tools run from the root of the repository, the user's paths count from here.
    work_dir, data = args.work_dir.absolute(), args.data.absolute()
    loaders = ('train', 'val', 'test')
    options = [
        '--cfg-options',
        *(f'{name}_dataloader.dataset.data_root={data}' for name in loaders),
    ]
    step(1, 'generate the data', 'tools/dataset_tools/make_shapes.py', str(data))
    step(2, 'train', 'tools/train.py', CONFIG, '--work-dir', str(work_dir), *options)

    checkpoint = Path((work_dir / 'last_checkpoint').read_text().strip())
    test_dir, pictures = work_dir / 'test', work_dir / 'pictures'
    test = ['tools/test.py', CONFIG, str(checkpoint), '--work-dir', str(test_dir)]
    step(3, 'test on images not seen in training', *test, '--show-dir', str(pictures), *options)

    metrics = json.loads(max(test_dir.glob('*/*.json')).read_text().splitlines()[-1])
    print(f'\nmIoU {metrics["mIoU"]:.1f} on the held-out images (table above)')
    print(f'pictures    {pictures}  (left: ground truth, right: prediction)')
    print(f'checkpoint  {checkpoint}')
    print(f'took        {time.monotonic() - start:.0f} s')


if __name__ == '__main__':
    main()
