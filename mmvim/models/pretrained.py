"""Weights from files: this project's checkpoints and the official ``.pth`` files.

A parameter of :class:`~mmvim.models.VisionMamba` or :class:`~mmvim.models.DeiT` has the same name
here as in the official checkpoints. What remains to be adapted is the number and place of class
tokens, the grid of the position embedding, on request the number of bands, and entries that the
backbone has no use for.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from mmengine.logging import print_log
from torch import Tensor

from mmvim.utils import CheckpointError, load_checkpoint

from .file_weights import FileWeights, read_weights, refuse_other_kinds
from .sequence import NUM_CLASS_TOKENS

__all__ = ['adapt_state_dict', 'fit_state_dict', 'load_pretrained', 'store_layout']

CLASS_TOKENS = ('cls_token', 'cls_token_head', 'cls_token_tail')
# The classifier, and tables that the official code stores though it could compute them.
IGNORED = ('head.weight', 'head.bias', 'rope.freqs_cos', 'rope.freqs_sin')
BANDS = 'patch_embed.proj.weight'
WHERE = 'in init_cfg, or for load_from in a FitCheckpointHook of custom_hooks,'


def load_pretrained(
    model,
    checkpoint: str,
    prefix: str | None = None,
    map_location: str = 'cpu',
    grid: Sequence[int] | None = None,
    bands: str | None = None,
    weights: str | None = None,
) -> None:
    """Load a file into a backbone; every parameter must be found and every entry be used.

    Args:
        model (PlainBackbone): Receives the weights.
        checkpoint (str): Path, URL or ``hf://OWNER/REPO/FILE`` of an official ``.pth`` file, of a
            checkpoint of this project's classifiers, segmentors or detectors, or of bare backbone
            weights.
        prefix (str, optional): Only take the entries that begin with it, such as ``'backbone.'``.
            None: the only one in the file, or ``'backbone.'``.
        map_location (str): As in :func:`torch.load`.
        grid, bands: As in :func:`fit_state_dict`.
        weights (str, optional): As in :func:`~mmvim.models.file_weights.read_weights`.

    Raises:
        ValueError: ``grid``, ``bands`` or ``weights`` is none of the choices.
        mmvim.utils.CheckpointError: The file is missing, damaged or unsafe, holds another
            architecture, or parameters are missing, left over or of another shape; the message
            names them.
    """
    file = read_weights(load_checkpoint(checkpoint, map_location), checkpoint, weights)
    if prefix is None:
        prefix = file.find_backbone(checkpoint)
    elif prefix and not prefix.endswith('.'):
        prefix += '.'
    if prefix not in ('', 'backbone.'):
        file.notes.append(f'names are those below {prefix}*')
    fitted = fit_state_dict(model, file.below(prefix), checkpoint, grid, bands)
    model.load_state_dict(fitted, strict=False)


def fit_state_dict(
    model,
    file: FileWeights,
    source: str,
    grid: Sequence[int] | None = None,
    bands: str | None = None,
) -> OrderedDict:
    """Entries under the backbone's own names, made to fit it; one line of the log says how.

    Args:
        model (PlainBackbone): What they are for; nothing is loaded into it here.
        file (FileWeights): Entries below the backbone; left as they are.
        source (str): Name of the file, for messages.
        grid (Sequence[int], optional): Rows and columns of patches that the file's position
            embedding stands for. None: what the file says; if it says nothing, a square.
        bands (str, optional): What to do where the pictures have another number of bands than
            those that the file was trained on. None: an error. ``'mean'``: every band gets the
            mean of the file's kernels, scaled so that a picture with the same value in all bands
            gives what it gave. ``'zero'``: the first bands keep their kernels and those added
            start at zero, so that the first bands give what they gave.

    Returns:
        OrderedDict: A state dict for ``model``.

    Raises:
        ValueError: ``grid`` or ``bands`` is none of the choices.
        mmvim.utils.CheckpointError: The entries are of another model, or some are missing, left
            over or of another shape; the message names ``source``, the first few of them and how
            many they are. Or one does not hold real numbers.
    """
    if bands not in (None, 'mean', 'zero'):
        raise ValueError(f"bands must be 'mean', 'zero' or None, got {bands!r}")
    stored = dict(file.metadata.get('', {}))
    _check_layout(stored, source)
    if grid is not None:
        stored['grid'] = _pair(grid)
    own = model.state_dict()
    refuse_other_kinds(file.entries, own, source)
    _check_dimensions(file.entries, own, source)
    _check_arch(model, file.entries, source)
    fitted = dict(file.entries)
    done = list(file.notes)
    if bands is not None and fitted[BANDS].shape[1:2] != own[BANDS].shape[1:2]:
        done.append(f'bands {fitted[BANDS].shape[1]} → {own[BANDS].shape[1]} ({bands})')
        fitted[BANDS] = _fit_bands(fitted[BANDS], own[BANDS].shape[1], bands)
    try:
        done += _adapt(model, fitted, stored)
    except CheckpointError as error:
        raise CheckpointError(f'{source}: {error}') from None
    added = model.added_parameters
    missing = [k for k in own if k not in fitted and k.rsplit('.', 1)[-1] not in added]
    left_over = [k for k in fitted if k not in own]
    reshaped = [
        f'{k} {tuple(fitted[k].shape)} for {tuple(own[k].shape)}'
        for k in own
        if k in fitted and fitted[k].shape != own[k].shape
    ]
    problems = [
        f'{len(keys)} {what}: {", ".join(keys[:5])}{" …" if len(keys) > 5 else ""}'
        for what, keys in (
            ('missing', missing),
            ('left over', left_over),
            ('of another shape', reshaped),
        )
        if keys
    ]
    name = type(model).__name__
    if problems:
        if BANDS in fitted and fitted[BANDS].shape[1:2] != own[BANDS].shape[1:2]:
            problems.append(f"bands='mean' or bands='zero' {WHERE} fits the kernels to other bands")
        raise CheckpointError(
            f'{source} does not fit this {name} ({model.traits}): {"; ".join(problems)}'
        )
    print_log('; '.join([f'{name}: took {len(fitted)} entries of {source}', *done]), 'current')
    fitted = OrderedDict(fitted)
    fitted._metadata = OrderedDict({'': {'version': 1, **_layout(model)}})  # type: ignore[attr-defined]
    return fitted


def _pair(grid: Sequence[int]) -> tuple[int, int]:
    sides = tuple(grid) if isinstance(grid, Sequence) else ()
    if len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
        raise ValueError(f'grid must be (rows, columns) of patches, got {grid!r}')
    return sides


def _check_dimensions(entries: dict[str, Tensor], own: dict[str, Tensor], source: str) -> None:
    """Refuse entries of which what follows could not ask for a side; sides are compared later."""
    for name, value in entries.items():
        if name in own and value.ndim != own[name].ndim:
            raise CheckpointError(
                f'{source}: {name} has shape {tuple(value.shape)}, not {tuple(own[name].shape)}'
            )


def _check_layout(stored: dict, source: str) -> None:
    """Refuse metadata that :func:`store_layout` does not write."""
    said = {key: stored[key] for key in ('grid', 'cls_token') if stored.get(key) is not None}
    try:
        if 'grid' in said:
            _pair(said['grid'])
        sound = isinstance(said.get('cls_token', ''), str)
    except ValueError:
        sound = False
    if not sound:
        raise CheckpointError(f'{source}: what it says of its grid is {said}')


def _fit_bands(kernels: Tensor, wanted: int, how: str) -> Tensor:
    """(C, held, k, k) kernels of the patch embedding for another number of bands."""
    held = kernels.shape[1]
    if how == 'mean':
        mean = kernels.float().mean(dim=1, keepdim=True) * held / wanted
        return mean.to(kernels.dtype).repeat(1, wanted, 1, 1)
    if wanted < held:
        raise CheckpointError(f"bands='zero' adds bands, but {wanted} are fewer than {held}")
    added = kernels.new_zeros(kernels.shape[0], wanted - held, *kernels.shape[2:])
    return torch.cat([kernels, added], dim=1)


def _check_arch(model, state_dict: dict[str, Tensor], checkpoint: str) -> None:
    weight = state_dict.get('patch_embed.proj.weight')
    blocks = {key.split('.')[1] for key in state_dict if key.startswith(f'{model.blocks_name}.')}
    if weight is None or not blocks:
        raise CheckpointError(
            f'{checkpoint} holds no {type(model).__name__} weights: its entries begin with '
            f'{sorted({key.split(".")[0] for key in state_dict})[:5]}'
        )
    held, wanted = (weight.shape[0], len(blocks)), (model.embed_dims, model.depth)
    if held != wanted:
        names = {(a['embed_dims'], a['depth']): name for name, a in model.arch_zoo.items()}
        held, wanted = (
            f'arch {names.get(arch, "unnamed")!r} (embed_dims={arch[0]}, depth={arch[1]})'
            for arch in (held, wanted)
        )
        raise CheckpointError(f'{checkpoint} holds {held}, but the model is {wanted}')


def store_layout(model, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Let the metadata of a state dict say what the position embedding's shape does not.

    Args:
        model (PlainBackbone): What the entries that begin with ``prefix`` are of.
        state_dict (dict[str, Tensor]): As given to ``Module._save_to_state_dict``.
        prefix (str): As there.
    """
    metadata = getattr(state_dict, '_metadata', {}).get(prefix[:-1])
    if metadata is not None:
        metadata.update(_layout(model))


def _layout(model) -> dict:
    if model.pos_embed is None:
        return {}
    return dict(grid=tuple(model.grid), cls_token=model.cls_token_place)


def adapt_state_dict(
    model, state_dict: dict[str, Tensor], prefix: str = '', metadata: dict | None = None
) -> None:
    """Make the entries of a state dict that begin with ``prefix`` fit a backbone, in place.

    What a module does with whatever is loaded into it: nothing is checked here, and one line of
    the log says what was done. Entries without a word on their grid are taken for the model's own
    if their number is right.

    Args:
        model (PlainBackbone): What they are for.
        state_dict (dict[str, Tensor]): As given to ``Module._load_from_state_dict``.
        prefix (str): As there.
        metadata (dict, optional): As there; may have what :func:`store_layout` puts there.
    """
    stored = dict(metadata or {})
    pos_embed = state_dict.get(f'{prefix}pos_embed')
    if 'grid' not in stored and pos_embed is not None:
        num_tokens = sum(prefix + name in state_dict for name in CLASS_TOKENS)
        if pos_embed.shape[1] - num_tokens == math.prod(model.grid):
            stored['grid'] = model.grid
    done = _adapt(model, state_dict, stored, prefix)
    if done:
        print_log(f'{type(model).__name__}: {"; ".join(done)}', logger='current')


def _adapt(model, state_dict: dict[str, Tensor], stored: dict, prefix: str = '') -> list[str]:
    """Fit entries in place; returns what was done, in words.

    Drops what the model does not have (classifier, rotary tables, class tokens, final norm),
    moves or drops the class tokens' rows of the position embedding and resizes the rest to the
    model's grid.
    """
    tokens = [name for name in CLASS_TOKENS if prefix + name in state_dict]
    unused = [*IGNORED, *(name for name in tokens if name not in model.cls_token_names)]
    if getattr(model, model.norm_name) is None:
        unused += [f'{model.norm_name}.weight', f'{model.norm_name}.bias']
    done = []
    if model.pos_embed is None:
        unused.append('pos_embed')
    elif prefix + 'pos_embed' in state_dict:
        pos_embed = state_dict[prefix + 'pos_embed']
        state_dict[prefix + 'pos_embed'], done = _adapt_pos_embed(model, pos_embed, tokens, stored)
    dropped = [name for name in unused if state_dict.pop(prefix + name, None) is not None]
    if dropped:
        done.append(f'ignored {", ".join(dropped)}')
    return done


def _adapt_pos_embed(
    model, pos_embed: Tensor, tokens: list[str], stored: dict
) -> tuple[Tensor, list[str]]:
    """Fit a file's (1, L, C) position embedding to the model's grid and class tokens."""
    place = model.cls_token_place
    # Where one class token stood, at the head or in the middle, only this project's files say.
    # Taken for the model's own place, or, for a model without, that of all released weights.
    single = stored.get('cls_token', place)
    if NUM_CLASS_TOKENS.get(single) != 1:
        single = place if NUM_CLASS_TOKENS[place] == 1 else model.released_cls_token
    held = {0: None, 1: single, 2: 'double'}[len(tokens)]
    num_patches = pos_embed.shape[1] - NUM_CLASS_TOKENS[held]
    grid, done = _held_grid(model, num_patches, stored.get('grid'))
    if held == place and grid == tuple(model.grid):
        return pos_embed, done
    # Where rows for class tokens are missing, so are those tokens, which is reported as such.
    fitted = model.fit_pos_embed(pos_embed, grid, held)
    change = f'pos_embed {pos_embed.shape[1]} → {fitted.shape[1]} rows'
    if grid != tuple(model.grid):
        change += f' ({_by(grid)} → {_by(model.grid)})'
    return fitted, [*done, change]


def _held_grid(
    model, num_patches: int, stored: Sequence[int] | None
) -> tuple[tuple[int, int], list[str]]:
    """The grid of a file's position embedding, and what was assumed about it."""
    own = tuple(model.grid)
    if stored is not None:
        grid = _pair(stored)
        if math.prod(grid) != num_patches:
            raise CheckpointError(
                f'pos_embed has rows for {num_patches} patches, not for a grid of {_by(grid)}'
            )
        return grid, []
    side = math.isqrt(num_patches)
    square = side * side == num_patches
    state = f'grid=(rows, columns) {WHERE}'
    if square and math.prod(own) == num_patches and own[0] != own[1]:
        raise CheckpointError(
            f'pos_embed has rows for {num_patches} patches, which may be {_by(own)}, as in this '
            f'model, or {side} × {side}, as in all official files: {state} tells'
        )
    if not square and math.prod(own) != num_patches:
        raise CheckpointError(
            f'pos_embed has rows for {num_patches} patches, which is neither a square nor the '
            f'grid of this model, {_by(own)}: {state} tells'
        )
    grid = (side, side) if square else own
    return grid, [f'pos_embed taken for {_by(grid)} patches, as the file does not say']


def _by(grid: Sequence[int]) -> str:
    return f'{grid[0]} × {grid[1]}'
