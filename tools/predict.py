"""Predict pictures: ``python tools/predict.py CONFIG CHECKPOINT photos/``.

One command for segmentation, detection and classification; docs/predict.md shows what it writes.
"""

import argparse
import csv
import time
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.progress import track

import mmvim  # noqa: F401  (registers the models)
from mmvim.apis import PictureError, load_model, predict, predict_raster
from mmvim.apis.inputs import Skipped, Source, find_pictures
from mmvim.apis.outputs import OPACITY, SCORE_THR, Results, open_table, results_of
from mmvim.apis.pictures import load_picture
from mmvim.apis.rasters import RASTERS
from mmvim.apis.whole import TILE
from mmvim.utils import guard_checkpoints
from mmvim.utils.launch import ConfigOptions, UserError, run

SHOWN = 20  # of the skipped files, in the terminal


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Predict pictures with a trained segmentor, detector or classifier'
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        'inputs',
        nargs='+',
        metavar='INPUT',
        help="pictures, folders (with all below them), and patterns such as 'photos/**/*.jpg'",
    )
    parser.add_argument(
        '--out-dir', type=Path, default=Path('predictions'), help='default: %(default)s'
    )
    parser.add_argument(
        '--device', help='such as cpu or cuda:1 (default: a GPU if there is one, else the CPU)'
    )
    parser.add_argument(
        '--batch-size',
        type=int,
        help='pictures in one pass, where they have the same size, or windows of --windows '
        '(default: 1)',
    )
    parser.add_argument(
        '--score-thr',
        type=float,
        help=f'detection: leave out what scores less (default: {SCORE_THR})',
    )
    parser.add_argument(
        '--opacity',
        type=float,
        default=OPACITY,
        help='of the colours drawn on pictures, from 0 to 1 (default: %(default)s)',
    )
    parser.add_argument(
        '--depth',
        type=int,
        metavar='BITS',
        help='bits that 16-bit samples really have, 8 to 16 (default: what each picture uses)',
    )
    parser.add_argument(
        '--raster',
        action='store_true',
        help='segmentation: the inputs are GeoTIFFs of any size, predicted at their own resolution '
        'and in bounded memory; the backbone sees all of a raster, unless there is --windows',
    )
    parser.add_argument(
        '--tile',
        type=int,
        metavar='PIXELS',
        help='--raster without --windows: what the head takes at once, for memory; it changes no '
        f'label (default: {TILE})',
    )
    parser.add_argument(
        '--windows',
        type=int,
        metavar='PIXELS',
        help='--raster: the whole model sees windows of so many pixels a side, one independent of '
        'the other, and their scores are blended; for any backbone and head',
    )
    parser.add_argument(
        '--overlap',
        type=int,
        metavar='PIXELS',
        help='--windows: by how much neighbours overlap at least (default: a quarter of a window)',
    )
    parser.add_argument(
        '--no-pictures',
        dest='pictures',
        action='store_false',
        help='write no pictures with the predictions drawn on them',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=ConfigOptions,
        metavar='KEY=VALUE',
        help='settings to change in the config, such as model.test_cfg.mode=slide',
    )
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='load a checkpoint that is more than weights; code in it will run',
    )
    args = parser.parse_args()
    if args.batch_size is not None and args.batch_size < 1:
        parser.error(f'--batch-size must be positive, got {args.batch_size}')
    for name in ('tile', 'windows'):
        value = getattr(args, name)
        if value is not None and (value < 1 or not args.raster):
            parser.error(f'--{name} must be positive and needs --raster, got {value}')
    if args.windows is None:
        if args.raster and args.batch_size is not None:
            parser.error(
                '--raster predicts one file at a time: leave --batch-size out, or give --windows'
            )
        if args.overlap is not None:
            parser.error(f'--overlap needs --windows, got {args.overlap}')
    elif args.tile is not None:
        parser.error(
            '--tile is for the head of a raster as a whole, --windows is the other way: give one'
        )
    elif args.overlap is not None and not 0 <= args.overlap < args.windows:
        parser.error(f'--overlap must be from 0 to less than --windows, got {args.overlap}')
    if args.depth is not None and not 8 <= args.depth <= 16:
        parser.error(f'--depth must be from 8 to 16, got {args.depth}')
    if args.out_dir.exists() and not args.out_dir.is_dir():
        parser.error(f'--out-dir must be a folder, and {args.out_dir} is a file')
    for name in ('score_thr', 'opacity'):
        value = getattr(args, name)
        if value is not None and not 0 <= value <= 1:
            parser.error(f'--{name.replace("_", "-")} must be from 0 to 1, got {value}')
    return args


class Run:
    """The pictures of one call, and what became of them."""

    def __init__(self, args: argparse.Namespace, model, results: Results) -> None:
        self.model = model
        self.results = results
        self.depth = args.depth
        self.skipped: list[Skipped] = []
        self.notes: Counter[str] = Counter()
        self.done = 0

    def predict_raster(self, source: Source, **ways) -> None:
        """Predict a GeoTIFF, in one of the ways of `mmvim.apis.predict_raster`; one that cannot be
        is skipped."""

        def show(items, what: str):
            return track(items, f'{source.path.name}: {what}', console=Console(stderr=True))

        suffix = source.path.suffix.lower()
        if suffix not in RASTERS:
            self.skipped.append(Skipped(source.path, f'no GeoTIFF, but {suffix}'))
            return
        target = self.results.place('labels', source, '.tif')
        try:
            overview = predict_raster(
                self.model, source.path, target, self.depth, track=show, **ways
            )
        except PictureError as error:
            self.skipped.append(Skipped(source.path, str(error)))
            return
        self.results.add_raster(source, *overview)
        self.done += 1

    def predict(self, sources: list[Source]) -> None:
        """Predict a few pictures; those that cannot be are skipped and do not stop the others."""
        pictures = []
        for source in sources:
            try:
                picture = load_picture(source.path, self.depth)
            except PictureError as error:
                self.skipped.append(Skipped(source.path, str(error)))
            else:
                pictures.append((source, picture))
        for (source, picture), sample in self.samples(pictures):
            self.results.add(source, picture.pixels, sample)
            self.notes.update(picture.notes)
            self.done += 1

    def samples(self, pictures: list[tuple]) -> list[tuple]:
        """Pictures with their data samples: together if that works, one by one if not."""
        if not pictures:
            return []
        arrays = [picture.pixels for _, picture in pictures]
        try:
            return list(zip(pictures, predict(self.model, arrays, len(arrays)), strict=True))
        except UserError:
            raise
        except Exception as error:  # not enough memory for it, too small for the network, …
            if len(pictures) > 1:
                return [item for one in pictures for item in self.samples([one])]
            ((source, _),) = pictures
            reason = f'cannot be predicted ({type(error).__name__}: {error})'
            self.skipped.append(Skipped(source.path, ' '.join(reason.split())))
            return []


def main() -> None:
    args = parse_args()
    guard_checkpoints(trust=args.trust_checkpoint)
    sources, skipped = find_pictures(args.inputs, args.out_dir)
    if not sources:
        report_skipped(skipped, args.out_dir)
        raise UserError(
            'nothing was predicted: there is no picture among the inputs outside of --out-dir '
            f'{args.out_dir}'
        )
    model = load_model(args.config, args.checkpoint, args.device, args.cfg_options)
    scope = model.cfg.default_scope
    if args.score_thr is not None and scope != 'mmdet':
        raise UserError(f'--score-thr is for detection, and the config is one of {scope}')
    score_thr = SCORE_THR if args.score_thr is None else args.score_thr
    results = results_of(scope)(
        args.out_dir, model.dataset_meta, args.pictures, args.opacity, score_thr
    )
    start = time.monotonic()
    try:
        with results:
            work = Run(args, model, results)
            if args.raster:
                names = 'tile', 'windows', 'overlap', 'batch_size'
                for source in sources:
                    work.predict_raster(source, **{name: getattr(args, name) for name in names})
            else:
                size = args.batch_size or 1
                batches = [sources[k : k + size] for k in range(0, len(sources), size)]
                for batch in track(batches, 'predicting', console=Console(stderr=True)):
                    work.predict(batch)
    except OSError as error:
        raise UserError(f'the results cannot be written: {error}') from None
    skipped += work.skipped
    report_skipped(skipped, args.out_dir)
    if not work.done:
        raise UserError(f'nothing was predicted: {len(skipped)} skipped, see above')
    report(work, time.monotonic() - start, args)


def report_skipped(skipped: list[Skipped], out_dir: Path) -> None:
    """Print the first few and write all to ``skipped.csv``."""
    path = out_dir / 'skipped.csv'
    path.unlink(missing_ok=True)  # of an earlier call
    if not skipped:
        return
    out_dir.mkdir(parents=True, exist_ok=True)
    with open_table(path) as file:
        csv.writer(file).writerows([('file', 'reason'), *skipped])
    print(f'skipped {len(skipped)}:')
    for file, reason in skipped[:SHOWN]:
        print(f'  {file}: {reason}')
    if len(skipped) > SHOWN:
        print(f'  … all are in {path}')


def report(work: Run, seconds: float, args: argparse.Namespace) -> None:
    for note, count in sorted(work.notes.items()):
        print(f'{count} of {work.done}: {note}')
    if args.depth is None and sum('-bit' in note for note in work.notes) > 1:
        print('their depths differ: give --depth BITS if they come from one sensor')
    print(f'predicted {work.done} in {seconds:.1f} s into {args.out_dir}:')
    print(f'  {work.results.described}')
    if args.pictures:
        print('  pictures/ (predictions drawn on the pictures)')


if __name__ == '__main__':
    run(main)
