"""Official Vim (or DeiT) weights to this project's names, or back to publish them.

Entries are renamed and wrapped, no number is changed: converting there and back gives the same
entries. Nothing has to be converted to be loaded; both forms are read everywhere.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

import mmvim
from mmvim.models.pretrained import weights_of
from mmvim.utils import CheckpointError, guard_checkpoints, load_checkpoint

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
    parser.add_argument('--force', action='store_true', help='replace DST if it is there')
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='read a SRC that is more than weights; code in it will run',
    )
    return parser.parse_args()


def to_mmvim(entries: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to those of a classifier here.

    Raises:
        CheckpointError: The names are not official ones.
    """
    if 'patch_embed.proj.weight' not in entries:
        hint = '; it looks like one of this project: --reverse?' if _is_ours(entries) else ''
        raise CheckpointError(f'no official weights: {_names(entries)}{hint}')
    there, here = HEAD
    return {
        (here + key.removeprefix(there) if key.startswith(there) else BACKBONE + key): value
        for key, value in entries.items()
    }


def to_official(entries: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """This project's names to official ones, and the entries that have no place there.

    Raises:
        CheckpointError: There is no backbone among the entries.
    """
    if not _is_ours(entries):
        raise CheckpointError(f'no backbone of this project: {_names(entries)}')
    there, here = HEAD
    official, left_out = {}, []
    for key, value in entries.items():
        if key.startswith(BACKBONE):
            official[key.removeprefix(BACKBONE)] = value
        elif key.startswith(here):
            official[there + key.removeprefix(here)] = value
        else:
            left_out.append(key)
    return official, left_out


def _is_ours(entries: dict[str, Tensor]) -> bool:
    return f'{BACKBONE}patch_embed.proj.weight' in entries


def _names(entries: dict[str, Tensor]) -> str:
    return f'{len(entries)} entries, the first are {", ".join(list(entries)[:4])}'


def save(content: dict, path: Path) -> None:
    """Write a checkpoint, whole or not at all."""
    partial = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        torch.save(content, partial)
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
        content = load_checkpoint(args.src)
        if not isinstance(content, dict):
            raise CheckpointError(f'{args.src} holds a {type(content).__name__}, not a checkpoint')
        entries, left_out = weights_of(content), []
        try:
            if args.reverse:
                converted, left_out = to_official(entries)
                save({'model': converted}, args.dst)
            else:
                converted = to_mmvim(entries)
                meta = dict(mmvim_version=mmvim.__version__)
                save({'state_dict': converted, 'meta': meta}, args.dst)
        except CheckpointError as error:
            raise CheckpointError(f'{args.src} holds {error}') from None
    except (CheckpointError, OSError) as error:
        sys.exit(f'vim_to_mmvim: {error}')
    print(f'{args.dst}: {len(converted)} entries')
    if left_out:
        parts = sorted({key.split('.')[0] for key in left_out})
        print(f'left out: {len(left_out)} entries of {", ".join(parts)}')


if __name__ == '__main__':
    main()
