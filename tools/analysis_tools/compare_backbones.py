"""Train Vim and DeiT by the same recipe on real images, test both, and tabulate what they reach.

Every side has the same seeds, and a seed the same images in the same order. Each run has a folder
in the work dir: finished ones are kept, a stopped one goes on from its last checkpoint with
--resume. Seed 0 of all sides comes before seed 1, so that what a stopped comparison has is fair.
The work dir then holds table.md, results.json, curves and pictures. docs/results.md shows some.
"""

import argparse
import itertools
import json
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config

from mmvim.comparison import report
from mmvim.comparison.runs import about, call, read_result, scalars, write_result
from mmvim.comparison.tasks import SIDES, TASKS, Task
from mmvim.utils import load_checkpoint
from mmvim.utils.launch import UserError, run

ROOT = Path(__file__).parents[2]
PICTURES = 6


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('task', choices=TASKS, help='data set; docs/data.md says where to get it')
    parser.add_argument(
        '--sides',
        nargs='+',
        choices=SIDES,
        default=['vim', 'deit'],
        metavar='SIDE',
        help=f'of {", ".join(SIDES)} (default: vim deit)',
    )
    parser.add_argument('--seeds', type=int, default=3, help='their number (default: %(default)s)')
    parser.add_argument('--arch', default='nano', help='nano (CPU) or tiny (default: %(default)s)')
    parser.add_argument('--data', type=Path, help='default: data/TASK')
    parser.add_argument('--work-dir', type=Path, help='default: work_dirs/compare_TASK_ARCH')
    parser.add_argument(
        '--lr',
        nargs='+',
        default=[],
        metavar='RATE',
        help="learning rates in place of the config's: every side with each of them; SIDE=RATE is "
        'for a single side',
    )
    parser.add_argument(
        '--split',
        choices=['test', 'val'],
        default='test',
        help='what is tested on; val is for choices, such as of the learning rate (default: '
        '%(default)s)',
    )
    parser.add_argument(
        '--resume', action='store_true', help='go on with the comparison in the work dir'
    )
    parser.add_argument(
        '--jobs',
        type=int,
        default=1,
        help='runs at a time, each with its share of the cores (default: %(default)s)',
    )
    parser.add_argument(
        '--max-runs', type=int, help='stop after so many runs; --resume goes on from there'
    )
    parser.add_argument(
        '--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='for every run'
    )
    args = parser.parse_args()
    for side in args.sides:
        if side not in TASKS[args.task].sides():
            parser.error(f'--sides: {args.task} has no {side!r}')
    for rate in args.lr:
        side, equals, _ = rate.rpartition('=')
        if equals and side not in args.sides:
            parser.error(f'--lr {rate}: {side!r} is not among the sides')
    for name in ('seeds', 'jobs'):
        if getattr(args, name) < 1:
            parser.error(f'--{name} must be positive, got {getattr(args, name)}')
    return args


class Comparison:
    """Sides of a task, their runs and what is written about them.

    Args:
        args (argparse.Namespace): The command line.
        task (Task): What is compared.
    """

    def __init__(self, args: argparse.Namespace, task: Task) -> None:
        self.task = task
        default = Path(f'work_dirs/compare_{task.name}_{args.arch}')
        self.work_dir = (args.work_dir or default).absolute()
        self.data = (args.data or Path(task.data)).absolute()
        self.split = args.split
        self.threads = max(1, torch.get_num_threads() // args.jobs)  # of a run
        self.label_maps = None
        if task.label_maps is not None:
            self.label_maps = self.data / task.label_maps.format(split=args.split)
        self.rows = {}  # name in the table: config, options
        for side in args.sides:
            config = task.config_of(side, args.arch, ROOT / 'configs')
            options = [*SIDES[side].options, *task.data_options(self.data, args.split)]
            options += args.cfg_options
            rates = [rate for rate in args.lr if rate.rpartition('=')[0] in ('', side)]
            if not rates:
                self.rows[side] = config, options
            for rate in (rate.rpartition('=')[2] for rate in rates):
                setting = f'optim_wrapper.optimizer.lr={rate}'
                self.rows[f'{side}_lr{rate}'] = config, [*options, setting]

    @property
    def metainfo(self) -> Config:
        """Classes and palette of the data set."""
        config, _ = next(iter(self.rows.values()))
        return Config.fromfile(config).test_dataloader.dataset.metainfo

    def folder(self, row: str, seed: int) -> Path:
        return self.work_dir / f'{row}_seed{seed}'

    def options(self, row: str, seed: int) -> list[str]:
        return [*self.rows[row][1], f'randomness.seed={seed}']

    def finished(self, row: str, seed: int) -> dict | None:
        return read_result(self.folder(row, seed), self.options(row, seed))

    def run(self, row: str, seed: int) -> dict:
        """Train, from the last checkpoint if there is one, and test."""
        folder, options = self.folder(row, seed), self.options(row, seed)
        folder.mkdir(parents=True, exist_ok=True)
        config = str(self.rows[row][0].relative_to(ROOT))
        arguments = ['--cfg-options', *options]
        train = ['tools/train.py', config, '--work-dir', str(folder), '--resume', *arguments]
        call(train, folder / 'train.log', ROOT, self.threads)
        checkpoint = Path((folder / 'last_checkpoint').read_text().strip())
        test = ['tools/test.py', config, str(checkpoint), '--work-dir', str(folder / 'test')]
        if self.label_maps is not None:
            test += ['--out', str(folder / 'predictions')]
        call([*test, *arguments], folder / 'test.log', ROOT, self.threads)
        log = max((folder / 'test').glob('*/*.json'))
        logged = json.loads(log.read_text().splitlines()[-1])
        metrics = {key: factor * logged[key] for key, (_, factor) in self.task.metrics.items()}
        weights = load_checkpoint(str(checkpoint))['state_dict']
        parameters = sum(w.numel() for name, w in weights.items() if name.startswith('backbone.'))
        return write_result(
            folder, options, metrics=metrics, parameters=parameters, checkpoint=str(checkpoint)
        )

    def write(self, results: report.Results, seeds: range) -> str:
        """Write tables, curves and pictures of the runs there are; return the tables."""
        tables = '\n'.join(
            report.table(results, seeds, key, name) for key, (name, _) in self.task.metrics.items()
        )
        details = {}
        trained = {row: [self.folder(row, seed) for seed in runs] for row, runs in results.items()}
        for key, name in {'loss': 'training loss', **{k: k for k in self.task.metrics}}.items():
            curves = {row: [scalars(f, key) for f in folders] for row, folders in trained.items()}
            curves = {row: [c for c in lines if c] for row, lines in curves.items()}
            curves = {row: lines for row, lines in curves.items() if lines}
            report.draw_curves(curves, name, self.work_dir / f'curve_{key.replace("/", "_")}.png')
        if self.label_maps is not None:
            text, details = self.write_classes(results)
            tables += f'\n{text}'
        self.write_pictures(results)
        (self.work_dir / 'table.md').write_text(tables)
        content = dict(task=self.task.name, **about(self.threads), **details, runs=results)
        (self.work_dir / 'results.json').write_text(json.dumps(content, indent=2) + '\n')
        return tables

    def write_classes(self, results: report.Results) -> tuple[str, dict]:
        """Per-class IoU, mean of the seeds, and the confusion matrices, their sum."""
        names, labels = self.metainfo.classes, self.label_maps
        lines = [f'| IoU | {" | ".join(names)} |', '| --- |' + ' ---: |' * len(names)]
        matrices, shares = {}, {}
        for row, runs in results.items():
            if not runs:
                continue
            found = [
                report.confusion(labels, self.folder(row, seed) / 'predictions', len(names))
                for seed in runs
            ]
            shares[row] = np.mean([report.ious(matrix) for matrix in found], axis=0).tolist()
            matrices[row] = np.sum(found, axis=0)
            lines.append(f'| `{row}` | {" | ".join(f"{iou:.1f}" for iou in shares[row])} |')
        if matrices:
            report.draw_confusion(matrices, names, self.work_dir / 'confusion.png')
        return '\n'.join(lines) + '\n', dict(classes=list(names), iou=shares)

    def write_pictures(self, results: report.Results) -> None:
        """The same images, as the first seed of every side sees them."""
        images = self.task.images_of(self.data, self.split)
        count = min(PICTURES, len(images))
        images = [images[k * len(images) // count] for k in range(count)]
        columns = {'image': images}
        if self.label_maps is not None:
            names, palette = self.metainfo.classes, self.metainfo.palette
            columns['ground truth'] = truths = []
            for image in images:
                truths.append(self.work_dir / 'truth' / image.name)
                truths[-1].parent.mkdir(exist_ok=True)
                labels = self.label_maps / f'{image.stem}.png'
                report.draw_labels(image, labels, names, palette, truths[-1])
        for row, runs in results.items():
            for seed in sorted(runs)[:1]:
                folder = self.folder(row, seed)
                drawn = [folder / 'drawn/pictures' / f'{image.stem}.jpg' for image in images]
                if not all(path.is_file() for path in drawn):
                    config, options = self.rows[row]
                    command = ['tools/predict.py', str(config), runs[seed]['checkpoint']]
                    command += [*map(str, images), '--out-dir', str(folder / 'drawn')]
                    command += ['--cfg-options', *options]
                    call(command, folder / 'predict.log', ROOT, self.threads)
                columns[row] = drawn
        report.contact_sheet(columns, self.work_dir / 'pictures.png')


def main() -> None:
    args = parse_args()
    comparison = Comparison(args, TASKS[args.task])
    if not comparison.data.is_dir():
        raise UserError(f'{comparison.data} is not there: docs/data.md says where to get it')
    if not args.resume and any(comparison.work_dir.glob('*_seed*')):
        raise UserError(
            f'{comparison.work_dir} holds a comparison: go on with --resume, or choose another '
            '--work-dir'
        )
    seeds = range(args.seeds)
    results: report.Results = {row: {} for row in comparison.rows}
    missing = []
    for seed, row in itertools.product(seeds, results):
        result = comparison.finished(row, seed)
        if result is None:
            missing.append((row, seed))
        else:
            results[row][seed] = result
    missing = missing[: args.max_runs]
    if not missing:
        comparison.work_dir.mkdir(parents=True, exist_ok=True)
        tables = comparison.write(results, seeds)
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = {pool.submit(comparison.run, *run): run for run in missing}
        try:
            for finished in as_completed(runs):
                row, seed = runs[finished]
                results[row][seed] = result = finished.result()
                print(f'{row}, seed {seed}: {json.dumps(result["metrics"])}', flush=True)
                tables = comparison.write(results, seeds)
        finally:
            pool.shutdown(cancel_futures=True)
    done = sum(map(len, results.values()))
    print(f'\n{tables}\n{done} of {args.seeds * len(results)} runs; {comparison.work_dir}')


if __name__ == '__main__':
    run(main)
