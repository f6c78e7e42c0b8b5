"""Weights from files: this project's checkpoints and the official ``.pth`` files.

A parameter of :class:`~mmvim.models.VisionMamba` or :class:`~mmvim.models.DeiT` has the same name
here as in the official checkpoints. What remains to be adapted is the number and place of class
tokens, the size of the position embedding, and entries that the backbone has no use for.
"""

from __future__ import annotations

import math

from mmengine.logging import print_log
from torch import Tensor

from mmvim.utils import CheckpointError, load_checkpoint

from .sequence import (
    NUM_CLASS_TOKENS,
    insert_class_tokens,
    resize_pos_embed,
    split_class_tokens,
)

__all__ = ['adapt_state_dict', 'fit_state_dict', 'load_pretrained', 'weights_of']

CLASS_TOKENS = ('cls_token', 'cls_token_head', 'cls_token_tail')
# The classifier, and tables that the official code stores though it could compute them.
IGNORED = ('head.weight', 'head.bias', 'rope.freqs_cos', 'rope.freqs_sin')


def load_pretrained(
    model, checkpoint: str, prefix: str | None = None, map_location: str = 'cpu'
) -> None:
    """Load a file into a backbone; every parameter must be found and every entry be used.

    Args:
        model (PlainBackbone): Receives the weights.
        checkpoint (str): Path or URL of an official ``.pth`` file, of a checkpoint of this
            project's classifiers, segmentors or detectors, or of bare backbone weights.
        prefix (str, optional): Only take the entries that begin with it, such as ``'backbone.'``
            (which is found without being named).
        map_location (str): As in :func:`torch.load`.

    Raises:
        mmvim.utils.CheckpointError: The file is missing, damaged or unsafe, holds another
            architecture, or parameters are missing, left over or of another shape; the message
            names them.
    """
    entries = weights_of(load_checkpoint(checkpoint, map_location))
    if prefix is None and any(key.startswith('backbone.') for key in entries):
        prefix = 'backbone.'
    if prefix is not None:
        prefix = prefix if prefix.endswith('.') else prefix + '.'
        entries = {k.removeprefix(prefix): v for k, v in entries.items() if k.startswith(prefix)}
    model.load_state_dict(fit_state_dict(model, entries, checkpoint), strict=False)


def weights_of(content: dict) -> dict[str, Tensor]:
    """The entries of a checkpoint that are weights: mmengine's, an official one's, or all."""
    for key in ('state_dict', 'model'):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    return {key.removeprefix('module.'): value for key, value in content.items()}


def fit_state_dict(
    model, entries: dict[str, Tensor], source: str, translated: str | None = None
) -> dict[str, Tensor]:
    """Entries under the backbone's own names, made to fit it; one line of the log says how.

    Args:
        model (PlainBackbone): What they are for; nothing is loaded into it here.
        entries (dict[str, Tensor]): What the file holds; left as it is.
        source (str): Name of the file, for messages.
        translated (str, optional): What was done to the names, for the log.

    Raises:
        mmvim.utils.CheckpointError: The entries are of another model, or some are missing, left
            over or of another shape; the message names ``source``, the first few of them and how
            many they are.
    """
    _check_arch(model, entries, source)
    fitted = dict(entries)
    done = [translated, *_adapt(model, fitted)] if translated else _adapt(model, fitted)
    own = model.state_dict()
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
        raise CheckpointError(
            f'{source} does not fit this {name} ({model.traits}): {"; ".join(problems)}'
        )
    print_log('; '.join([f'{name}: took {len(fitted)} entries of {source}', *done]), 'current')
    return fitted


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


def adapt_state_dict(model, state_dict: dict[str, Tensor], prefix: str = '') -> None:
    """Make the entries of a state dict that begin with ``prefix`` fit a backbone, in place.

    What a module does with whatever is loaded into it: nothing is checked here, and one line of
    the log says what was done.
    """
    done = _adapt(model, state_dict, prefix)
    if done:
        print_log(f'{type(model).__name__}: {"; ".join(done)}', logger='current')


def _adapt(model, state_dict: dict[str, Tensor], prefix: str = '') -> list[str]:
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
        state_dict[prefix + 'pos_embed'] = adapted = _adapt_pos_embed(model, pos_embed, tokens)
        if adapted is not pos_embed:
            done.append(f'pos_embed {pos_embed.shape[1]} → {adapted.shape[1]} rows')
    dropped = [name for name in unused if state_dict.pop(prefix + name, None) is not None]
    if dropped:
        done.append(f'ignored {", ".join(dropped)}')
    return done


def _adapt_pos_embed(model, pos_embed: Tensor, tokens: list[str]) -> Tensor:
    """Fit a file's (1, L, C) position embedding to the model's grid and class tokens."""
    place = model.cls_token_place
    # One class token may stand at the head or in the middle, which a file does not tell. Taken
    # for the model's own place, or, for a model without, that of all released weights.
    single = place if NUM_CLASS_TOKENS[place] == 1 else model.released_cls_token
    held = {0: None, 1: single, 2: 'double'}[len(tokens)]
    num_patches = pos_embed.shape[1] - NUM_CLASS_TOKENS[held]
    grid = model.grid
    if num_patches != grid[0] * grid[1]:
        side = math.isqrt(num_patches)
        if side * side != num_patches:
            raise CheckpointError(
                f'pos_embed with {pos_embed.shape[1]} rows and {len(tokens)} class tokens is '
                f'neither square nor of the grid {grid} of img_size'
            )
        grid = (side, side)
    if held == place and grid == model.grid:
        return pos_embed
    resized = resize_pos_embed(pos_embed, grid, model.grid, held)
    patches, rows = split_class_tokens(resized, held)
    if rows.shape[1] < NUM_CLASS_TOKENS[place]:
        return patches  # the class token itself is missing too, and reported as such
    return insert_class_tokens(patches, rows, place)
