"""Official Vim (or DeiT) weights to this project's names, or back to publish them.

Entries are renamed and wrapped, no number is changed: converting there and back gives the same
entries. Nothing has to be converted to be loaded; both forms are read everywhere. Files that end
in .safetensors are read and written, too.
"""

import argparse
import os
import sys
from collections import OrderedDict
from pathlib import Path

import torch

import mmvim
from mmvim.models.file_weights import FileWeights, read_weights
from mmvim.utils import CheckpointError, guard_checkpoints, load_checkpoint, save_safetensors

BACKBONE, HEAD = 'backbone.', ('head.', 'head.fc.')  # here; the classifier there and here


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('src', help='file to read, or its address')
    parser.add_argument('dst', type=Path, help='file to write')
    parser.add_argument(
        '--reverse',
        action='store_true',
        help='from a classifier, segmentor or detector of this project to the official form: its '
        'backbone, and its classifier if it has one',
    )
    parser.add_argument(
        '--weights',
        choices=['model', 'ema'],
        help='of a file that holds both: the weights that were trained, or their moving average',
    )
    parser.add_argument('--force', action='store_true', help='replace DST if it is there')
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='read a SRC that is more than weights; code in it will run',
    )
    return parser.parse_args()


def to_mmvim(file: FileWeights) -> OrderedDict:
    """Official names to those of a classifier here, as a state dict.

    Raises:
        CheckpointError: The names are not official ones.
    """
    if 'patch_embed.proj.weight' not in file.entries:
        hint = '; it looks like one of this project: --reverse?' if _is_ours(file) else ''
        raise CheckpointError(f'no official weights: {_names(file)}{hint}')
    there, here = HEAD
    entries = {
        (here + key.removeprefix(there) if key.startswith(there) else BACKBONE + key): value
        for key, value in file.entries.items()
    }
    metadata = {f'{BACKBONE}{key}'.rstrip('.'): value for key, value in file.metadata.items()}
    return FileWeights(entries, metadata).state_dict()


def to_official(file: FileWeights) -> tuple[OrderedDict, list[str]]:
    """This project's names to official ones, and the entries that have no place there.

    Raises:
        CheckpointError: There is no backbone among the entries.
    """
    if not _is_ours(file):
        raise CheckpointError(f'no backbone of this project: {_names(file)}')
    there, here = HEAD
    official, left_out = {}, []
    for key, value in file.entries.items():
        if key.startswith(BACKBONE):
            official[key.removeprefix(BACKBONE)] = value
        elif key.startswith(here):
            official[there + key.removeprefix(here)] = value
        else:
            left_out.append(key)
    return FileWeights(official, file.below(BACKBONE).metadata).state_dict(), left_out


def _is_ours(file: FileWeights) -> bool:
    return f'{BACKBONE}patch_embed.proj.weight' in file.entries


def _names(file: FileWeights) -> str:
    return f'{len(file.entries)} entries, the first are {", ".join(list(file.entries)[:4])}'


def save(entries: OrderedDict, path: Path, official: bool) -> None:
    """Write a checkpoint, whole or not at all."""
    partial = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        if path.suffix == '.safetensors':
            save_safetensors(entries, str(partial))
        elif official:
            torch.save({'model': entries}, partial)
        else:
            meta = dict(mmvim_version=mmvim.__version__)
            torch.save({'state_dict': entries, 'meta': meta}, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def main() -> None:
    args = parse_args()
    guard_checkpoints(trust=args.trust_checkpoint)
    try:
        if args.dst.exists() and not args.force:
            raise CheckpointError(f'{args.dst} is there already: pass --force to replace it')
        if not args.dst.absolute().parent.is_dir():
            raise CheckpointError(f'{args.dst.parent}: there is no such folder')
        file, left_out = read_weights(load_checkpoint(args.src), args.src, args.weights), []
        try:
            if args.reverse:
                converted, left_out = to_official(file)
            else:
                converted = to_mmvim(file)
        except CheckpointError as error:
            raise CheckpointError(f'{args.src} holds {error}') from None
        save(converted, args.dst, official=args.reverse)
    except (CheckpointError, OSError) as error:
        sys.exit(f'vim_to_mmvim: {error}')
    print('; '.join([f'{args.dst}: {len(converted)} entries', *file.notes]))
    if left_out:
        parts = sorted({key.split('.')[0] for key in left_out})
        print(f'left out: {len(left_out)} entries of {", ".join(parts)}')


if __name__ == '__main__':
    main()
