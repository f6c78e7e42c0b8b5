"""Whole-model loading (``load_from``) of what :mod:`mmvim.models.pretrained` can read."""

from __future__ import annotations

from collections import OrderedDict

from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import HOOKS
from torch import nn

from mmvim.models.plain_backbone import PlainBackbone
from mmvim.models.pretrained import fit_state_dict, weights_of
from mmvim.utils import CheckpointError

__all__ = ['FitCheckpointHook', 'fit_checkpoint']


@HOOKS.register_module()
class FitCheckpointHook(Hook):
    """Lets ``load_from`` take official ``.pth`` files, and checks the backbone's part of any file.

    mmengine looks for weights under ``'state_dict'`` and only warns where they do not fit; an
    official file, which has them under ``'model'``, would leave the model as it was initialised.
    This project's tools add the hook to every config. It does nothing where the backbone is not
    one of this project's.

    Raises:
        mmvim.utils.CheckpointError: The file does not fit the backbone, or is to be resumed from
            and holds weights only.
    """

    priority = 'VERY_HIGH'  # before hooks that look into the state dict, as EMAHook does

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        source = runner._load_from or 'the checkpoint'
        if runner._resume and 'meta' not in checkpoint:
            raise CheckpointError(
                f'{source} holds weights and no state of a training: start from it with '
                f'--cfg-options load_from={source} instead of --resume'
            )
        fit_checkpoint(runner.model, checkpoint, source)


def fit_checkpoint(model: nn.Module, checkpoint: dict, source: str) -> None:
    """Make a loaded checkpoint fit a segmentor, detector or classifier, in place.

    Entries under a bare backbone's names, as official files have them, get the model's names; the
    official classifier goes into ``head.fc`` where the model has one of the same shape. Parts of
    the model that the file does not have, such as a decode head, stay as they are.

    Args:
        model (nn.Module): What the weights are for; nothing is loaded into it here.
        checkpoint (dict): What mmengine read; afterwards its ``'state_dict'`` fits.
        source (str): Name of the file, for messages.

    Raises:
        mmvim.utils.CheckpointError: The file holds another architecture, or parameters of the
            backbone are missing, left over or of another shape.
    """
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    backbones = ((n, m) for n, m in model.named_modules() if isinstance(m, PlainBackbone))
    name, backbone = next(backbones, (None, None))
    if backbone is None:
        return
    entries, prefix = weights_of(checkpoint), f'{name}.' if name else ''
    others, translated = {}, None
    if 'patch_embed.proj.weight' in entries:
        own, wanted = entries, model.state_dict()
        for part in ('weight', 'bias'):
            head, fc = entries.get(f'head.{part}'), wanted.get(f'head.fc.{part}')
            if head is not None and fc is not None and head.shape == fc.shape:
                others[f'head.fc.{part}'] = own.pop(f'head.{part}')
        translated = f'names translated to {prefix}*{" and head.fc.*" if others else ""}'
    else:
        own = {k.removeprefix(prefix): v for k, v in entries.items() if k.startswith(prefix)}
        others = {k: v for k, v in entries.items() if not k.startswith(prefix)}
    fitted = fit_state_dict(backbone, own, source, translated)
    state_dict = OrderedDict({**{prefix + k: v for k, v in fitted.items()}, **others})
    # Versions of modules, by which some of them bring older entries up to date.
    state_dict._metadata = getattr(checkpoint.get('state_dict'), '_metadata', OrderedDict())
    checkpoint['state_dict'] = state_dict
