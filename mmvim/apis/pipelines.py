"""The config's test pipeline, for pictures that have been read already and have no labels."""

from __future__ import annotations

from collections.abc import Iterator

from mmengine.config import Config, ConfigDict
from mmengine.dataset import Compose

from mmvim.utils.launch import UserError

__all__ = ['build_pipeline', 'inner_datasets']

LABELS = ('LoadAnnotations', 'LoadPanopticAnnotations', 'LoadDepthAnnotation')


def inner_datasets(config: Config) -> Iterator[ConfigDict]:
    """The data sets of the test dataloader that read files, inside of any wrappers."""
    waiting = [(config.get('test_dataloader') or {}).get('dataset')]
    while waiting:
        dataset = waiting.pop(0)
        inner = dataset and (dataset.get('datasets') or dataset.get('dataset'))
        if inner:
            waiting = [*(inner if isinstance(inner, list | tuple) else [inner]), *waiting]
        elif dataset:
            yield dataset


def build_pipeline(config: Config) -> Compose:
    """Build the test pipeline without what loads the picture and its labels.

    It is given a dict of ``img`` (BGR, as OpenMMLab's loaders give it), ``img_shape``,
    ``ori_shape``, ``img_path`` and ``img_id``.

    Raises:
        UserError: There is no test pipeline, or it does not begin by loading one colour picture.
    """
    found = (dataset.get('pipeline') for dataset in inner_datasets(config))
    steps = next((steps for steps in found if steps), None) or config.get('test_pipeline')
    if not steps:
        raise UserError('the config has neither test_dataloader.dataset.pipeline nor test_pipeline')
    loader, *steps = steps
    color = loader.get('color_type', 'color')
    if _name(loader) != 'LoadImageFromFile' or not color.startswith('color'):
        raise UserError(
            'the test pipeline must begin with LoadImageFromFile, and its color_type be color, to '
            f'predict pictures; it begins with {dict(loader)}'
        )
    steps = [step for step in steps if _name(step) not in LABELS]
    if loader.get('to_float32'):
        steps.insert(0, _to_float32)
    return Compose(steps)


def _name(step: dict) -> str:
    kind = step['type']
    return (kind if isinstance(kind, str) else kind.__name__).rpartition('.')[2]


def _to_float32(results: dict) -> dict:
    results['img'] = results['img'].astype('float32')
    return results
