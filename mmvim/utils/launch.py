"""What the command line tools share: arguments, the config, and errors that end clearly.

One ``train.py`` and one ``test.py`` serve segmentation, detection and classification; the config's
``default_scope`` says which of the OpenMMLab packages does the work.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from mmengine.config import Config, ConfigDict, DictAction

from .checkpoint import CheckpointError, guard_checkpoints

__all__ = [
    'UserError',
    'check_data',
    'command_line',
    'common_parser',
    'load_config',
    'read_config',
    'run',
]

# default_scope of a config -> this project's extra that installs the package
EXTRAS = {'mmseg': 'seg', 'mmdet': 'det', 'mmpretrain': 'cls'}


class UserError(Exception):
    """Something only the user can mend; shown without a traceback."""


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
        action=DictAction,
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
    scope = cfg.get('default_scope', 'mmengine')
    if scope in EXTRAS and find_spec(scope) is None:
        raise _not_installed(path, scope)
    cfg.merge_from_dict(options or {})
    return cfg


def load_config(args: argparse.Namespace) -> Config:
    """Read the config and apply what the command line says; raises as :func:`read_config`."""
    cfg = read_config(args.config, args.cfg_options)
    # What --cfg-options load_from, --resume and test.py name may be an official file.
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), dict(type='FitCheckpointHook')]
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs', Path(args.config).stem))
    return cfg


def _not_installed(config: str, scope: str) -> UserError:
    return UserError(
        f'config {config} is one for {scope}, which is not installed here. '
        f"Install it with: pip install --no-build-isolation '.[{EXTRAS[scope]}]'"
    )


def check_data(cfg: Config, *loaders: str) -> None:
    """Look for the data of the named dataloaders and their evaluators before anything is built.

    Raises:
        UserError: A folder or file is missing; the message says which setting names it.
    """
    for loader in loaders:
        for dataset in _datasets((cfg.get(loader) or {}).get('dataset')):
            root = dataset.get('data_root') or ''
            prefix = dataset.get('data_prefix') or {}
            prefix = {'': prefix} if isinstance(prefix, str) else prefix
            parts = {'data_root': '', 'ann_file': dataset.get('ann_file')}
            parts |= {f'data_prefix.{key}'.rstrip('.'): part for key, part in prefix.items()}
            for key, part in parts.items():
                if '://' not in str(root):
                    folder = f'{loader}.dataset.data_root=FOLDER'
                    _check_path(Path(root, part or ''), f'{loader}.dataset.{key}', folder)
        name = loader.replace('dataloader', 'evaluator')
        evaluators = cfg.get(name) or []
        for evaluator in evaluators if isinstance(evaluators, list) else [evaluators]:
            path = evaluator.get('ann_file') or ''
            if '://' not in path:
                _check_path(Path(path), f'{name}.ann_file', f'{name}.ann_file=FILE')


def _check_path(path: Path, setting: str, remedy: str) -> None:
    if not path.exists():
        raise UserError(
            f'{setting}: {path} does not exist. See docs/data.md for how to prepare the data, '
            f'or point to it with --cfg-options {remedy}'
        )


def _datasets(dataset: ConfigDict | list | None) -> Iterator[ConfigDict]:
    """The data sets that read files, inside of any wrappers."""
    if dataset is None:
        return
    inner = dataset if isinstance(dataset, list) else dataset.get('datasets')
    inner = inner or ([dataset['dataset']] if 'dataset' in dataset else None)
    if inner is None:
        yield dataset
        return
    for wrapped in inner:
        yield from _datasets(wrapped)


def run(main: Callable[[], None]) -> None:
    """Call ``main``; errors meant for the user end the process with their message alone."""
    try:
        main()
    except (UserError, CheckpointError, FloatingPointError) as error:
        sys.exit(f'{Path(sys.argv[0]).name}: {error}')
