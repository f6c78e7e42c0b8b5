"""Whole models from files: what ``load_from`` and ``test.py`` read, and what they refuse."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import HOOKS
from torch import nn

from mmvim.models.file_weights import plain_name, read_weights, refuse_other_kinds
from mmvim.models.plain_backbone import PlainBackbone
from mmvim.models.pretrained import fit_state_dict
from mmvim.utils import CheckpointError

__all__ = ['FillModelHook', 'FitCheckpointHook', 'fill_model', 'fit_checkpoint']

# Parts that have no say in predictions; a checkpoint may lack them.
UNUSED = ('auxiliary_head.',)


@HOOKS.register_module()
class FitCheckpointHook(Hook):
    """Lets ``load_from`` take official ``.pth`` files, and checks the backbone's part of any file.

    mmengine looks for weights under ``'state_dict'`` and only warns where they do not fit; an
    official file, which has them under ``'model'``, would leave the model as it was initialised.
    This project's tools add the hook to every config that does not have it. It does nothing where
    the backbone is not one of this project's.

    Args:
        grid, bands: As in :func:`~mmvim.models.pretrained.fit_state_dict`.
        weights (str, optional): As in :func:`~mmvim.models.file_weights.read_weights`.

    Raises:
        mmvim.utils.CheckpointError: The file does not fit the backbone, or is to be resumed from
            and holds weights only.
    """

    priority = 'VERY_HIGH'  # before hooks that look into the state dict, as EMAHook does

    def __init__(
        self,
        grid: Sequence[int] | None = None,
        bands: str | None = None,
        weights: str | None = None,
    ) -> None:
        self.how = dict(grid=grid, bands=bands, weights=weights)

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        source = runner._load_from or 'the checkpoint'
        if not runner._resume:
            fit_checkpoint(runner.model, checkpoint, source, **self.how)
            return
        if 'meta' not in checkpoint:
            raise CheckpointError(
                f'{source} holds weights and no state of a training: start from it with '
                f'--cfg-options load_from={source} instead of --resume'
            )
        # A training goes on with what it wrote; EMAHook finds the averages in their place.
        fit_checkpoint(runner.model, checkpoint, source, grid=self.how['grid'])


@HOOKS.register_module()
class FillModelHook(Hook):
    """Refuses a checkpoint that does not have all of the model.

    mmengine only warns of what is missing or has another shape, and would test a head that is still
    as it was initialised. ``test.py`` adds the hook to every config; a training that starts from a
    backbone must not have it.

    Raises:
        mmvim.utils.CheckpointError: There are no weights in the file, or some of the model are
            missing or have another shape; the message names them.
    """

    priority = 'VERY_LOW'  # after hooks that change the state dict

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        fill_model(runner.model, checkpoint, runner._load_from or 'the checkpoint')


def fill_model(model: nn.Module, checkpoint: dict, source: str) -> None:
    """Load a checkpoint that :func:`fit_checkpoint` has seen, which must have all of the model.

    It may lack counters of batch norm, auxiliary heads, which have no say in predictions, and what
    a backbone has in ``added_parameters``. Other entries in it are passed over.

    Args:
        model (nn.Module): Receives the weights.
        checkpoint (dict): Weights, or a dict with them under ``'state_dict'``.
        source (str): Name of the file, for messages.

    Raises:
        mmvim.utils.CheckpointError: There are no weights in it, or some of the model are missing or
            have another shape; the message names them.
    """
    held = checkpoint.get('state_dict', checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(held, dict):
        raise CheckpointError(f'checkpoint {source} holds no weights')
    # As mmengine does, for files of distributed trainings.
    weights = OrderedDict((key.removeprefix('module.'), value) for key, value in held.items())
    weights._metadata = getattr(held, '_metadata', OrderedDict())  # type: ignore[attr-defined]
    model = _unwrapped(model)
    advice = (
        'Give the config that it was trained with; a model of which there is the backbone only is '
        'trained first, from load_from'
    )
    try:
        missing = model.load_state_dict(weights, strict=False).missing_keys
    except RuntimeError as error:  # other shapes
        reason = str(error).splitlines()[1].strip().rstrip('.')
        raise CheckpointError(
            f'checkpoint {source} is not one of this config: {reason}. {advice}'
        ) from None
    backbones = (module for module in model.modules() if isinstance(module, PlainBackbone))
    optional = {'num_batches_tracked', *(name for b in backbones for name in b.added_parameters)}
    missing = [
        key
        for key in missing
        if not key.startswith(UNUSED) and key.rsplit('.', 1)[-1] not in optional
    ]
    if missing:
        more = f' and {len(missing) - 3} more' if len(missing) > 3 else ''
        raise CheckpointError(
            f'checkpoint {source} does not have all of the model: {", ".join(missing[:3])}{more} '
            f'would stay as they were initialised. {advice}'
        )


def _unwrapped(model: nn.Module) -> nn.Module:
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def fit_checkpoint(
    model: nn.Module,
    checkpoint: dict,
    source: str,
    grid: Sequence[int] | None = None,
    bands: str | None = None,
    weights: str | None = None,
) -> None:
    """Make a loaded checkpoint fit a segmentor, detector or classifier, in place.

    Entries under a bare backbone's names, as official files have them, get the model's names; the
    official classifier goes into ``head.fc`` where the model has one of the same shape. Parts of
    the model that the file does not have, such as a decode head, stay as they are.

    Args:
        model (nn.Module): What the weights are for; nothing is loaded into it here.
        checkpoint (dict): What mmengine read; afterwards its ``'state_dict'`` fits.
        source (str): Name of the file, for messages.
        grid, bands: As in :func:`~mmvim.models.pretrained.fit_state_dict`.
        weights (str, optional): As in :func:`~mmvim.models.file_weights.read_weights`.

    Raises:
        mmvim.utils.CheckpointError: The file holds another architecture, or parameters of the
            backbone are missing, left over or of another shape, or an entry does not hold real
            numbers.
    """
    model = _unwrapped(model)
    modules = dict(model.named_modules())
    backbones = ((n, m) for n, m in modules.items() if isinstance(m, PlainBackbone))
    name, backbone = next(backbones, (None, None))
    if backbone is None:
        return
    file = read_weights(checkpoint, source, weights)
    name = plain_name(name)
    prefix = f'{name}.' if name else ''
    held = file.find_backbone(source, prefix)
    if prefix and held.endswith(f'.{prefix}'):  # the whole model, inside of something else
        outside = held.removesuffix(prefix)
        file.notes.append(f'names are those below {outside}*')
        file, held = file.below(outside), prefix
    own = file.below(held)
    full = model.state_dict()
    wanted = {plain_name(key): key for key in full}
    others: dict = {}
    if held == prefix:
        others = {k: v for k, v in file.entries.items() if not f'{k}.'.startswith(prefix)}
    else:
        for part in ('weight', 'bias'):
            head, fc = own.entries.get(f'head.{part}'), wanted.get(f'head.fc.{part}')
            if head is not None and fc is not None and head.shape == full[fc].shape:
                others[f'head.fc.{part}'] = own.entries.pop(f'head.{part}')
        names = f'{prefix}*{" and head.fc.*" if others else ""}'
        left = len(file.entries) - len(own.entries) - len(others)
        own.notes.append(
            f'names translated{f" from {held}*" if held else ""} to {names}'
            + (f', {left} others ignored' if left else '')
        )
    refuse_other_kinds(others, {plain: full[key] for plain, key in wanted.items()}, source)
    fitted = fit_state_dict(backbone, own, source, grid, bands)
    entries = {**{prefix + k: v for k, v in fitted.items()}, **others}
    state_dict = OrderedDict((wanted.get(k, k), v) for k, v in entries.items())
    # Versions of modules, by which some of them bring older entries up to date.
    metadata = {**(file.metadata if held == prefix else {}), name: fitted._metadata['']}
    names = {plain_name(key): key for key in modules}
    state_dict._metadata = OrderedDict((names.get(k, k), v) for k, v in metadata.items())
    checkpoint['state_dict'] = state_dict
