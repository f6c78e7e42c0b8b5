"""Weights from files: this project's checkpoints and the official ``.pth`` files.

A parameter of :class:`~mmvim.models.VisionMamba` or :class:`~mmvim.models.DeiT` has the same name
here as in the official checkpoints. What remains to be adapted is the number and place of class
tokens, the size of the position embedding, and entries that the backbone has no use for.
"""

from __future__ import annotations

import math

from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader
from torch import Tensor

from mmvim.utils import load_from_local

from .sequence import (
    NUM_CLASS_TOKENS,
    insert_class_tokens,
    resize_pos_embed,
    split_class_tokens,
)

__all__ = ['adapt_state_dict', 'load_pretrained']

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
        ValueError: The file holds another architecture, or parameters are missing or left over;
            the message names them.
        mmvim.utils.CheckpointError: The file is missing, damaged or unsafe.
    """
    if '://' in checkpoint:
        content = CheckpointLoader.load_checkpoint(checkpoint, map_location)
    else:
        content = load_from_local(checkpoint, map_location)
    state_dict = _backbone_entries(content, prefix)
    _check_arch(model, state_dict, checkpoint)
    result = model.load_state_dict(state_dict, strict=False)
    added = model.added_parameters
    missing = [key for key in result.missing_keys if key.rsplit('.', 1)[-1] not in added]
    problems = [
        f'{len(keys)} {what}: {", ".join(keys[:5])}{" …" if len(keys) > 5 else ""}'
        for what, keys in (('missing', missing), ('left over', result.unexpected_keys))
        if keys
    ]
    if problems:
        raise ValueError(
            f'{checkpoint} does not fit this {type(model).__name__} ({model.traits}): '
            f'{"; ".join(problems)}'
        )
    print_log(
        f'{type(model).__name__}: loaded {len(state_dict)} entries of {checkpoint}',
        logger='current',
    )


def _backbone_entries(content: dict, prefix: str | None) -> dict[str, Tensor]:
    """The backbone's part of a checkpoint, under the backbone's own names."""
    for key in ('state_dict', 'model'):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    entries = {key.removeprefix('module.'): value for key, value in content.items()}
    if prefix is None and any(key.startswith('backbone.') for key in entries):
        prefix = 'backbone.'
    if prefix is None:
        return entries
    prefix = prefix if prefix.endswith('.') else prefix + '.'
    return {k.removeprefix(prefix): v for k, v in entries.items() if k.startswith(prefix)}


def _check_arch(model, state_dict: dict[str, Tensor], checkpoint: str) -> None:
    weight = state_dict.get('patch_embed.proj.weight')
    blocks = {key.split('.')[1] for key in state_dict if key.startswith(f'{model.blocks_name}.')}
    if weight is None or not blocks:
        raise ValueError(
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
        raise ValueError(f'{checkpoint} holds {held}, but the model is {wanted}')


def adapt_state_dict(model, state_dict: dict[str, Tensor], prefix: str = '') -> None:
    """Make the entries of a state dict that begin with ``prefix`` fit a backbone, in place.

    Drops what the model does not have (classifier, rotary tables, class tokens, final norm),
    moves or drops the class tokens' rows of the position embedding and resizes the rest to the
    model's grid. One line of the log says what was done.
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
    if done:
        print_log(f'{type(model).__name__}: {"; ".join(done)}', logger='current')


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
            raise ValueError(
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
