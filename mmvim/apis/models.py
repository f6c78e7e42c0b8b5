"""Building a trained segmentor, detector or classifier from its config and checkpoint."""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, DefaultScope
from torch import nn

from mmvim.engine.checkpoint_hook import fill_model, fit_checkpoint
from mmvim.utils import load_checkpoint
from mmvim.utils.launch import EXTRAS, UserError, read_config

from .pipelines import inner_datasets

__all__ = ['load_model']


def load_model(
    config: str | Path | Config,
    checkpoint: str | Path,
    device: str | torch.device | None = None,
    options: dict | None = None,
) -> nn.Module:
    """Build the model of a config and load a checkpoint into it, ready to predict.

    Args:
        config (str | Path | Config): A config of segmentation (``default_scope`` mmseg), detection
            (mmdet) or classification (mmpretrain).
        checkpoint (str | Path): A path or an address; this project's and OpenMMLab's files, and
            the official classifiers.
        device (str | torch.device, optional): Default: what the machine has, the CPU at last.
        options (dict, optional): Settings of the config to change, as ``--cfg-options`` does.

    Returns:
        nn.Module: In evaluation mode. ``model.cfg`` is the config and ``model.dataset_meta`` a
        dict of ``classes`` (names) and ``palette`` (RGB), one for each class that the model tells
        apart. They come from the checkpoint, or else from the config's data set; where neither has
        as many names as the model has classes, the names are numbers.

    Raises:
        UserError: The config is missing or none of these tasks, or there is no such device.
        CheckpointError: The checkpoint cannot be read, or does not fill the model.
    """
    if not isinstance(config, Config):
        config = read_config(str(config), options)
    elif options:
        config.merge_from_dict(options)
    scope = config.get('default_scope')
    if scope not in EXTRAS:
        raise UserError(f'default_scope must be one of {", ".join(EXTRAS)}, got {scope}')
    device = _device(device)
    if config.get('data_preprocessor') is not None:  # as mmpretrain's configs have it
        config.model.setdefault('data_preprocessor', config.data_preprocessor)
    with DefaultScope.overwrite_default_scope(scope):
        model = revert_sync_batchnorm(MODELS.build(config.model))
        content = load_checkpoint(str(checkpoint))
        fit_checkpoint(model, content, str(checkpoint))
        fill_model(model, content, str(checkpoint))
        model.dataset_meta = _names_and_colours(model, content, config)
    model.cfg = config
    return model.to(device).eval()


def _device(name: str | torch.device | None) -> torch.device:
    try:
        device = torch.device(get_device() if name is None else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'device {name} cannot be used: {str(error).splitlines()[0]}') from None
    return device


def _names_and_colours(model: nn.Module, content: dict, config: Config) -> dict:
    """The first of the sources that has one for each class of the model."""
    meta = _dict(content.get('meta'))
    sources = [_dict(meta.get('dataset_meta')), meta]  # of mmseg and mmdet before 1.0 and 3.0, too
    with DATASETS.switch_scope_and_registry(config.default_scope) as registry:
        for dataset in inner_datasets(config):
            kind = dataset.get('type')
            kind = registry.get(kind) if isinstance(kind, str) else kind
            sources += [_dict(dataset.get('metainfo')), getattr(kind, 'METAINFO', {})]
    sources = [{str(key).lower(): value for key, value in source.items()} for source in sources]
    count = _num_classes(model)

    def first(key: str, is_one: Callable[[Any], bool]):
        found = (source.get(key) for source in sources)
        lists = [v for v in found if isinstance(v, list | tuple) and all(map(is_one, v))]
        return next((list(value) for value in lists if count in (None, len(value))), None)

    classes = first('classes', lambda name: isinstance(name, str))
    classes = classes or [f'class {k}' for k in range(count or 0)]
    palette = first('palette', _is_colour) if count is not None else None
    if palette is None or len(palette) != len(classes):
        palette = _distinct_colours(len(classes))
    return dict(classes=classes, palette=[tuple(map(int, colour)) for colour in palette])


def _dict(value) -> dict:
    """What a file should have a dict for, an empty one where it has none."""
    return value if isinstance(value, dict) else {}


def _is_colour(value) -> bool:
    """Whether it is three numbers that a byte holds."""
    if not isinstance(value, list | tuple | np.ndarray) or len(value) != 3:
        return False
    return all(isinstance(part, Real) and 0 <= part <= 255 for part in value)


def _num_classes(model: nn.Module) -> int | None:
    """How many classes the last head tells apart; None where its kind is not known."""
    places = [(getattr(model, 'roi_head', None), 'bbox_head')]
    places += [(model, name) for name in ('decode_head', 'bbox_head', 'head')]
    for owner, name in places:
        head = getattr(owner, name, None)
        head = head[-1] if isinstance(head, nn.ModuleList) else head
        if name == 'decode_head' and getattr(head, 'out_channels', None) == 1:
            return 2  # on either side of a threshold; mmseg takes num_classes=1 for it, too
        number = getattr(head, 'num_classes', None)
        if number is not None:
            return number
    return None


def _distinct_colours(count: int) -> list[tuple[int, ...]]:
    """Hues a golden section apart, so that neighbours differ however many there are."""
    hues = ((0.61803399 * k) % 1 for k in range(count))
    return [tuple(round(255 * v) for v in colorsys.hsv_to_rgb(hue, 0.75, 0.9)) for hue in hues]
