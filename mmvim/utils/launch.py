"""What the command line tools share: arguments, the config, and errors that end clearly.

One ``train.py`` and one ``test.py`` serve segmentation, detection and classification; the config's
``default_scope`` says which of the OpenMMLab packages does the work.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import sys
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.dataset import BaseDataset
from mmengine.dist import is_distributed
from torch import distributed

from .checkpoint import CheckpointError, guard_checkpoints
from .data import check_data, describe, type_name, use_checked_coco
from .errors import UserError

__all__ = [
    'ConfigOptions',
    'UserError',
    'check_data',
    'command_line',
    'common_parser',
    'load_config',
    'read_config',
    'run',
    'type_name',
]

# default_scope of a config -> this project's extra that installs the package
EXTRAS = {'mmseg': 'seg', 'mmdet': 'det', 'mmpretrain': 'cls'}


class ConfigOptions(DictAction):
    """mmengine's ``KEY=VALUE`` arguments, which would lose the spaces in paths."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        super().__call__(parser, namespace, [_hide_spaces(given) for given in values])
        options = getattr(namespace, self.dest)
        setattr(namespace, self.dest, {key: _show_spaces(v) for key, v in options.items()})


def _hide_spaces(given: str) -> str:
    """Replace the value's spaces by null characters, except those that only set out a list."""
    key, equals, value = given.partition('=')
    inside = r'(?<=[^ ,[\]()]) +(?=[^ ,[\]()])' if ',' in value else r'(?<=[^ ]) +(?=[^ ])'
    return key + equals + re.sub(inside, lambda spaces: '\0' * len(spaces[0]), value)


def _show_spaces(value):
    if isinstance(value, list | tuple):
        return type(value)(map(_show_spaces, value))
    return value.replace('\0', ' ') if isinstance(value, str) else value


def common_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the arguments that training and testing have in common."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--work-dir',
        help='folder for logs and checkpoints (default: work_dirs/<name of the config>)',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=ConfigOptions,
        metavar='KEY=VALUE',
        help="settings to change in the config, such as train_cfg.max_iters=100 or key='[a,b]'",
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='how the processes of a distributed run were started',
    )
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='load checkpoints that are more than weights; code in them will run',
    )
    # torch.distributed.launch passes this to every process.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser


SIDES = {'mmpretrain': 224, 'mmseg': 512, 'mmdet': 1024}  # of the paper's images


class _Shape(argparse.Action):
    """One or two positive numbers, as height and width."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if len(values) > 2 or min(values) < 1:
            parser.error(f'--shape takes one or two positive numbers, got {values}')
        setattr(namespace, self.dest, (values[0], values[-1]))


def add_shape(parser: argparse.ArgumentParser) -> None:
    """Add ``--shape``; without it there is :func:`default_shape`."""
    parser.add_argument(
        '--shape',
        nargs='+',
        type=int,
        action=_Shape,
        metavar=('H', 'W'),
        help='height and width of the images, or one number for both (default: 224 for '
        'classification, 512 for segmentation, 1024 for detection)',
    )


def default_shape(scope: str) -> tuple[int, int]:
    """Height and width of the paper's images, by a config's ``default_scope``."""
    side = SIDES.get(scope, 224)
    return side, side


def command_line(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the arguments and prepare the process for them."""
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    guard_checkpoints(trust=args.trust_checkpoint)
    return args


def read_config(path: str, options: dict | None = None) -> Config:
    """Read a config and change the settings that ``options`` (``--cfg-options``) name.

    ``configs/vim/….py`` that is not there is the one that came with the package.

    Raises:
        UserError: There is no such file, or the package of its scope is not installed.
    """
    shipped = Path(__file__).parents[1] / '.mim' / path
    if not Path(path).is_file() and shipped.is_file():
        path = str(shipped)
    if not Path(path).is_file():
        raise UserError(f'config {path}: there is no such file')
    try:
        cfg = Config.fromfile(path)
    except ImportError as error:
        missing = (error.name or str(error)).split()[0]
        raise _not_installed(path, missing) if missing in EXTRAS else error from None
    if cfg.get('default_scope') is None:
        _set_scope(cfg)
    scope = cfg.get('default_scope', 'mmengine')
    if scope in EXTRAS and find_spec(scope) is None:
        raise _not_installed(path, scope)
    cfg.merge_from_dict(options or {})
    return cfg


def _set_scope(cfg: Config) -> None:
    """Take the scope from the model's class, as pure-Python configs need not name one."""
    kind = (cfg.get('model') or {}).get('type')
    package = '' if kind is None or isinstance(kind, str) else kind.__module__.partition('.')[0]
    if package in EXTRAS:
        cfg.default_scope = package


def load_config(args: argparse.Namespace) -> Config:
    """Read the config and apply what the command line says; raises as :func:`read_config`."""
    cfg = read_config(args.config, args.cfg_options)
    # What --cfg-options load_from, --resume and test.py name may be an official file.
    _add_hooks(cfg, 'FitCheckpointHook', 'CheckDataHook')
    use_checked_coco(cfg)
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs', Path(args.config).stem))
    return cfg


def _add_hooks(cfg: Config, *names: str) -> None:
    """Add hooks that the config does not have, with their default settings."""
    hooks = list(cfg.get('custom_hooks') or [])
    there = {type_name(hook['type']) for hook in hooks}
    cfg.custom_hooks = [*hooks, *(dict(type=name) for name in names if name not in there)]


def _not_installed(config: str, scope: str) -> UserError:
    return UserError(
        f'config {config} is one for {scope}, which is not installed here. '
        f"Install it with: pip install --no-build-isolation '.[{EXTRAS[scope]}]'"
    )


def run(main: Callable[[], None]) -> None:
    """Call ``main``; errors meant for the user end the process with their message alone."""
    if isinstance(sys.stdout, TextIOWrapper):
        # Names of files may be no text, or of letters that this terminal does not have.
        sys.stdout.reconfigure(errors='backslashreplace')
    try:
        main()
        leave_processes()
    except (UserError, CheckpointError, FloatingPointError) as error:
        sys.exit(f'{Path(sys.argv[0]).name}: {error}')
    except ValueError as error:
        explanation = explain(error)
        if explanation is None:
            raise
        sys.exit(f'{Path(sys.argv[0]).name}: {explanation}')


def leave_processes() -> None:
    """End a distributed run together: a process that is still at work must not lose the others.

    The group's threads end with the last reference to it, and models in cycles of references hold
    some. A thread that is still there while Python shuts down can abort the process.
    """
    if is_distributed():
        distributed.barrier()
        distributed.destroy_process_group()
        gc.collect()


def explain(error: ValueError) -> str | None:
    """What the user can do about an error of torch or mmengine that does not say it."""
    if 'Expected more than 1 value per channel when training' in str(error):
        return (
            'batch norm met a single value per channel, as from one picture pooled to 1 x 1: train '
            'with train_dataloader.batch_size of 2 or more and drop_last=True, or replace batch '
            "norm by norm_cfg=dict(type='GN', num_groups=…) in neck and heads"
        )
    if 'need at least one array to concatenate' in str(error):
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        owners = [frame.f_locals.get('self') for frame in frames]
        empty = [owner for owner in owners if isinstance(owner, BaseDataset)]
        if empty:
            return (
                f'the data set is empty ({describe(empty[-1])}): no picture is listed there or has '
                'its img_suffix, or filter_cfg leaves none'
            )
    return None
