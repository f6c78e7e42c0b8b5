"""Data sets and metrics in configs: what is wrong with them is said before anything is built."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mmengine.config import Config, ConfigDict

from .errors import UserError

__all__ = [
    'check_data',
    'describe',
    'evaluator_dicts',
    'is_local',
    'leaves',
    'type_name',
    'use_checked_coco',
]

# mmdet's types, and those of this project that also check and mend the annotation file.
CHECKED = {'CocoDataset': 'CheckedCocoDataset', 'CocoMetric': 'CheckedCocoMetric'}
SPLITS = ('train', 'val', 'test')


def type_name(kind: str | type) -> str:
    """The bare name of a config's ``type``: a name, one with its scope, or a class."""
    return kind.rpartition('.')[2] if isinstance(kind, str) else kind.__name__


def is_local(*backends: dict | None) -> bool:
    """Whether all of these ``backend_args`` mean files of this machine."""
    return all((args or {}).get('backend', 'local') == 'local' for args in backends)


def check_data(cfg: Config, *loaders: str) -> None:
    """Look for the data of the named dataloaders and their evaluators.

    Files that a storage backend serves (``backend_args``, or ``://`` in the path) are not looked
    for.

    Raises:
        UserError: A folder or file is missing or empty, or a setting cannot be right; the message
            says which.
    """
    for loader in loaders:
        for dataset in dataset_dicts((cfg.get(loader) or {}).get('dataset')):
            _check_classes(dataset, f'{loader}.dataset')
            _check_paths(dataset, loader)
        name = loader.replace('dataloader', 'evaluator')
        for evaluator in evaluator_dicts(cfg.get(name)):
            path, setting = evaluator.get('ann_file'), f'{name}.ann_file'
            _check_one_file(path, setting)
            if path and is_local(evaluator.get('backend_args')):
                _check_path('', path, setting, f'{setting}=FILE')


def use_checked_coco(cfg: Config) -> None:
    """Put this project's COCO data set and metric in the place of mmdet's, in every split.

    Subclasses of mmdet's are left as they are.
    """
    found = False
    for split in SPLITS:
        datasets = dataset_dicts((cfg.get(f'{split}_dataloader') or {}).get('dataset'))
        for part in (*datasets, *evaluator_dicts(cfg.get(f'{split}_evaluator'))):
            name = type_name(part.get('type', ''))
            if name in CHECKED and _package(part['type'], cfg) == 'mmdet':
                part['type'] = f'mmdet.{CHECKED[name]}'
                found = True
    if found:
        import mmvim.datasets  # noqa: F401  (registers them)

        # For the copy of the config in the work dir.
        imports = cfg.get('custom_imports') or dict(imports=[])
        names = imports['imports']
        names = [names] if isinstance(names, str) else list(names)
        if 'mmvim.datasets' not in names:
            cfg.custom_imports = dict(imports, imports=[*names, 'mmvim.datasets'])


def _package(kind: str | type, cfg: Config) -> str:
    """The package that a config's ``type`` comes from."""
    if isinstance(kind, str):
        return kind.rpartition('.')[0] or cfg.get('default_scope') or 'mmengine'
    return kind.__module__.partition('.')[0]


def dataset_dicts(dataset: ConfigDict | list | None) -> Iterator[ConfigDict]:
    """The configs of data sets that read files, inside of any wrappers."""
    if dataset is None:
        return
    inner = dataset if isinstance(dataset, list) else dataset.get('datasets')
    inner = inner or ([dataset['dataset']] if 'dataset' in dataset else None)
    if inner is None:
        yield dataset
        return
    for wrapped in inner:
        yield from dataset_dicts(wrapped)


def evaluator_dicts(evaluator: ConfigDict | list | None) -> Iterator[ConfigDict]:
    """The configs of single metrics in any form that mmengine takes."""
    if isinstance(evaluator, list | tuple):
        for metric in evaluator:
            yield from evaluator_dicts(metric)
    elif isinstance(evaluator, dict):
        if 'metrics' in evaluator:
            yield from evaluator_dicts(evaluator['metrics'])
        else:
            yield evaluator


def leaves(dataset) -> Iterator:
    """The data sets that read files, inside of any wrappers."""
    inner = getattr(dataset, 'datasets', None)
    inner = [dataset.dataset] if inner is None and hasattr(dataset, 'dataset') else inner
    if inner is None:
        yield dataset
        return
    for wrapped in inner:
        yield from leaves(wrapped)


def describe(dataset) -> str:
    """The class and the files of a built data set, in words."""
    first = next(leaves(dataset), None)
    prefix = getattr(first, 'data_prefix', None) or {}
    files = [getattr(first, 'ann_file', ''), *(prefix.values() if isinstance(prefix, dict) else [])]
    named = [str(path) for path in files if path] or [str(getattr(first, 'data_root', '') or '')]
    return ', '.join([type(first).__name__, *(name for name in named if name)])


def _check_classes(dataset: ConfigDict, setting: str) -> None:
    """Class names must be a sequence, or the name of a file that has one in each line."""
    for key, holder in (('metainfo.classes', dataset.get('metainfo')), ('classes', dataset)):
        classes = (holder or {}).get('classes')
        if isinstance(classes, str) and '://' not in classes and not Path(classes).is_file():
            raise UserError(
                f'{setting}.{key} is the string {classes!r}, neither a sequence of names nor a '
                f'file of them. A single class needs a comma: classes=({classes!r},)'
            )


def _check_one_file(path, setting: str) -> None:
    if isinstance(path, list | tuple):
        raise UserError(
            f'{setting} must be one file, got {len(path)}: {", ".join(map(str, path))}. Join data '
            "sets with dict(type='ConcatDataset', datasets=[…]), one data set for each file"
        )


def _check_paths(dataset: ConfigDict, loader: str) -> None:
    root, ann_file = dataset.get('data_root') or '', dataset.get('ann_file')
    setting = f'{loader}.dataset'
    remedy = f'{setting}.data_root=FOLDER'
    # Pictures are read by the pipeline, which may have a backend of its own.
    backends = [step.get('backend_args') for step in _steps(dataset)]
    local_files = is_local(dataset.get('backend_args'))
    local_pictures = local_files and is_local(*backends)
    _check_one_file(ann_file, f'{setting}.ann_file')
    if local_pictures:
        _check_path(root, '', f'{setting}.data_root', remedy)
    if local_files and ann_file:
        _check_path(root, ann_file, f'{setting}.ann_file', remedy)
    prefix = dataset.get('data_prefix') or {}
    prefix = {'': prefix} if isinstance(prefix, str) else prefix
    for key, part in prefix.items() if local_pictures else ():
        _check_path(root, part, f'{setting}.data_prefix.{key}'.rstrip('.'), remedy)


def _steps(dataset: ConfigDict) -> list[dict]:
    return [step for step in dataset.get('pipeline') or [] if isinstance(step, dict)]


def _check_path(root: str, part: str | None, setting: str, remedy: str) -> None:
    if '://' in str(root) or '://' in str(part):
        return
    path = Path(root, part or '')
    if not path.exists():
        raise UserError(
            f'{setting}: {path} does not exist. See docs/data.md for how to prepare the data, '
            f'or point to it with --cfg-options {remedy}'
        )
    if path.is_file() and path.stat().st_size == 0:
        raise UserError(f'{setting}: {path} is empty (0 bytes)')
