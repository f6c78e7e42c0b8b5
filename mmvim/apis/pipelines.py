"""The config's test pipeline, for pictures that have been read already and have no labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mmengine.config import Config, ConfigDict
from mmengine.dataset import Compose

from mmvim.utils.launch import UserError, type_name

__all__ = [
    'build_pipeline',
    'inner_datasets',
    'pipeline_steps',
    'refuse_other_steps',
    'refuse_other_tasks',
]

# What a raster is predicted without, as it is predicted at its own size.
PACKING = ('Resize', 'PackSegInputs')
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


def pipeline_steps(config: Config) -> list[dict | Callable]:
    """The steps of the test pipeline without what loads the picture and its labels.

    Raises:
        UserError: There is no test pipeline, or it does not begin by loading one colour picture.
    """
    found = (dataset.get('pipeline') for dataset in inner_datasets(config))
    steps = next((steps for steps in found if steps), None) or config.get('test_pipeline')
    if not steps:
        raise UserError('the config has neither test_dataloader.dataset.pipeline nor test_pipeline')
    loader, *steps = steps
    color = loader.get('color_type', 'color')
    if type_name(loader['type']) != 'LoadImageFromFile' or not color.startswith('color'):
        raise UserError(
            'the test pipeline must begin with LoadImageFromFile, and its color_type be color, to '
            f'predict pictures; it begins with {dict(loader)}'
        )
    steps = [step for step in steps if type_name(step['type']) not in LABELS]
    return [_to_float32, *steps] if loader.get('to_float32') else steps


def refuse_other_tasks(config: Config, refuse: Callable[[str], None]) -> None:
    """Call ``refuse`` with the reason where the config is none of segmentation."""
    if config.default_scope != 'mmseg':
        refuse(f'it must be a segmentor, and its config is one of {config.default_scope}')


def refuse_other_steps(config: Config, refuse: Callable[[str], None]) -> None:
    """Call ``refuse`` with the reason where steps do more than load, resize and pack, which is all
    that rasters get.

    Raises:
        UserError: As :func:`pipeline_steps`.
    """
    steps = [type_name(step['type']) for step in pipeline_steps(config) if isinstance(step, dict)]
    others = [step for step in steps if step not in PACKING]
    if others:
        refuse(f'its test pipeline has {", ".join(others)}, which would not be done to a raster')


def build_pipeline(config: Config) -> Compose:
    """Build the test pipeline for pictures that have been read already and have no labels.

    It is given a dict of ``img`` (BGR, as OpenMMLab's loaders give it), ``img_shape``,
    ``ori_shape``, ``img_path`` and ``img_id``.

    Raises:
        UserError: As :func:`pipeline_steps`.
    """
    return Compose(pipeline_steps(config))


def _to_float32(results: dict) -> dict:
    results['img'] = results['img'].astype('float32')
    return results
