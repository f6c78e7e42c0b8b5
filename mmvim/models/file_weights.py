"""Which entries of a checkpoint file are weights, and their names without wrappers' parts."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmvim.utils import CheckpointError

__all__ = ['FileWeights', 'plain_name', 'read_weights', 'refuse_other_kinds']

# Every backbone of this project has it, under this name in every file.
ANCHOR = 'patch_embed.proj.weight'
AVERAGED = ('model_ema', 'state_dict_ema')


@dataclass
class FileWeights:
    """Weights by name.

    Attributes:
        entries (dict[str, Tensor]): Names are those of the model itself, without what wrappers
            (``module.``, ``_orig_mod.``) put into them.
        metadata (dict[str, dict]): What the file says of each module, as ``_metadata`` of a
            module's state dict; also without wrappers' names.
        notes (list[str]): What was chosen among the contents of the file, for the log.
    """

    entries: dict[str, Tensor]
    metadata: dict[str, dict] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def below(self, prefix: str) -> FileWeights:
        """The part whose names begin with ``prefix`` (``''`` or with a dot at its end), shortened.

        A module's metadata is looked up by ``metadata.get('')`` afterwards.
        """

        def shorten(part: dict) -> dict:
            dotted = ((f'{key}.', value) for key, value in part.items())
            return {k[len(prefix) : -1]: v for k, v in dotted if k.startswith(prefix)}

        return FileWeights(shorten(self.entries), shorten(self.metadata), list(self.notes))

    def find_backbone(self, source: str, expected: str = 'backbone.') -> str:
        """The prefix of the backbone's names.

        Args:
            source (str): Name of the file, for messages.
            expected (str): Preferred where several models are in the file.

        Returns:
            str: ``''`` for bare weights, and where there is no backbone at all.

        Raises:
            mmvim.utils.CheckpointError: There are several, none of them where expected.
        """
        found = [k.removesuffix(ANCHOR) for k in self.entries if f'.{k}'.endswith(f'.{ANCHOR}')]
        for prefix in (expected, '', 'backbone.'):
            if prefix in found:
                return prefix
        if len(found) > 1:
            names = ', '.join(f'{prefix}*' for prefix in found)
            raise CheckpointError(
                f'{source} holds several models, named {names}: prefix=… in init_cfg chooses one'
            )
        return found[0] if found else ''

    def state_dict(self) -> OrderedDict:
        """The entries as a state dict with its metadata."""
        state_dict = OrderedDict(self.entries)
        state_dict._metadata = OrderedDict(self.metadata)  # type: ignore[attr-defined]
        return state_dict


def read_weights(content, source: str, weights: str | None = None) -> FileWeights:
    """Find the weights in what was read from a checkpoint file.

    Args:
        content: mmengine's or an official checkpoint, one of another training script that has its
            weights under ``'state_dict'`` or ``'model'``, or a state dict.
        source (str): Name of the file, for messages.
        weights (str, optional): ``'model'`` or ``'ema'``, where a file holds the weights that were
            trained and their moving average. None: what such a file offers first, the average of
            mmengine's, the trained ones of an official file.

    Raises:
        ValueError: ``weights`` is none of these.
        mmvim.utils.CheckpointError: The file does not hold them, or no weights at all.
    """
    if weights not in (None, 'model', 'ema'):
        raise ValueError(f"weights must be 'model', 'ema' or None, got {weights!r}")
    if not isinstance(content, dict):
        raise CheckpointError(f'{source} holds a {type(content).__name__}, not a checkpoint')
    kinds = _kinds(content)
    chosen = weights or next(iter(kinds))
    if chosen not in kinds:
        raise CheckpointError(
            f'{source} holds no weights={weights!r}, only {", ".join(map(repr, kinds))}: '
            f'its entries are {", ".join(map(str, list(content)[:8]))}'
        )
    state_dict = kinds[chosen]
    entries = {
        key: value
        for key, value in state_dict.items()
        if isinstance(key, str) and (isinstance(value, Tensor) or key.endswith('_extra_state'))
    }
    if state_dict is content.get('ema_state_dict'):
        entries.pop('steps', None)  # of averaging
    notes = []
    if weights is None and len(kinds) > 1:
        other = next(kind for kind in kinds if kind != chosen)
        notes.append(f'weights={chosen!r}, the file also holds weights={other!r}')
    metadata = getattr(state_dict, '_metadata', None)
    said = metadata.items() if isinstance(metadata, dict) else ()
    metadata = {plain_name(module): v for module, v in said if isinstance(v, dict)}
    return FileWeights(_under_plain_names(entries, source), metadata, notes)


def _kinds(content: dict) -> dict[str, dict]:
    """The kinds of weights in a file, the one that it offers first ahead."""
    held = {key: value for key, value in content.items() if isinstance(value, dict)}
    first = next((held[key] for key in ('state_dict', 'model') if key in held), None)
    if 'ema_state_dict' in held and first is not None:
        # mmengine's EMAHook writes the averages where others write the weights, and vice versa.
        return {'ema': first, 'model': held['ema_state_dict']}
    averaged = next((held[key] for key in AVERAGED if key in held), None)
    kinds = {'model': first, 'ema': averaged}
    if first is None and averaged is None:
        kinds['model'] = content
    return {kind: value for kind, value in kinds.items() if value is not None}


def plain_name(name: str) -> str:
    """A name without the parts that DistributedDataParallel and torch.compile put into it."""
    parts = [part for part in name.split('.') if part != '_orig_mod']
    while parts and parts[0] == 'module':
        parts = parts[1:]
    return '.'.join(parts)


def _under_plain_names(entries: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """The entries under their plain names.

    Raises:
        mmvim.utils.CheckpointError: Two names are one without what wrappers put into them.
    """
    plain: dict[str, Tensor] = {}
    for key, value in entries.items():
        name = plain_name(key)
        if name in plain:
            raise CheckpointError(f'{source} holds {name} more than once, also as {key}')
        plain[name] = value
    return plain


def refuse_other_kinds(entries: dict, own: dict[str, Tensor], source: str) -> None:
    """Refuse entries that loading would turn into other numbers in silence, or not at all.

    Args:
        entries (dict): What a file has.
        own (dict[str, Tensor]): What a model has, under the same names.
        source (str): Name of the file, for messages.

    Raises:
        mmvim.utils.CheckpointError: An entry is an integer, boolean or complex tensor where the
            model has real numbers, or is quantised, sparse or without data.
    """
    for name, value in entries.items():
        if name not in own or not isinstance(value, Tensor):
            continue
        kind = None
        if value.is_meta:
            kind = 'without data'
        elif value.layout != torch.strided:
            kind = str(value.layout)
        elif own[name].is_floating_point() and not value.is_floating_point():  # or quantised
            kind = str(value.dtype)
        if kind is not None:
            raise CheckpointError(f'{source}: {name} is {kind}, not {own[name].dtype}')
