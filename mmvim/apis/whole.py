"""Segmenting a picture that does not fit the memory, with all of it in the backbone at once.

The picture is read a strip at a time into patch tokens, over which the backbone's blocks run as
over any. Its maps go into files. Neck and head then take them a tile at a time
(:mod:`.tiled_head`), so that scores of all classes are never held for more than a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from mmvim.models import VisionMamba
from mmvim.models.sequence import resize_pos_embed, split_class_tokens
from mmvim.utils.launch import UserError
from mmvim.utils.preprocessing import normalise

from .pipelines import refuse_other_steps, refuse_other_tasks
from .record import Record, Track
from .tiled_head import TiledHead, Window

__all__ = ['TILE', 'WholeSegmentor']

TILE = 1024
# Rows of a strip are as many as make about so many tokens.
STRIP = 2**15


class MapFiles:
    """The backbone's maps, in files of (rows, columns, C) float32.

    Reading through them does not count as memory of the process, as that of mapped files does.

    Args:
        folder (Path): Where they are.
        count (int): Number of maps.
        grid (tuple[int, int]): Their rows and columns.
        channels (int): C.
    """

    def __init__(self, folder: Path, count: int, grid: tuple[int, int], channels: int) -> None:
        self.grid, self.channels = grid, channels
        self.paths = [folder / f'map-{k}.float32' for k in range(count)]

    def write(self, k: int, parts: Iterable[Tensor]) -> None:
        """Write map ``k``, of which the parts (cells, C) come in order."""
        with open(self.paths[k], 'wb') as file:
            for part in parts:
                part.float().cpu().contiguous().numpy().tofile(file)

    def read(self, window: Window) -> list[Tensor]:
        """A window of each map, (1, C, h, w)."""
        height, width = window.size
        maps = []
        for path in self.paths:
            values = np.empty((height, width, self.channels), np.float32)
            with open(path, 'rb') as file:
                for row in range(height):
                    cell = (window.top + row) * self.grid[1] + window.left
                    file.seek(cell * self.channels * values.itemsize)
                    file.readinto(values[row])
            maps.append(torch.from_numpy(values).permute(2, 0, 1).contiguous()[None])
        return maps


class WholeSegmentor:
    """A segmentor for pictures of any size, whose backbone sees all of a picture.

    Labels are those that :func:`~mmvim.apis.predict` gives, except for rounding, where the sides of
    a picture are multiples of ``multiple``. Others are filled up to it, by repeating the border,
    where ``predict`` would stretch the picture a little.

    Args:
        model (nn.Module): From :func:`~mmvim.apis.load_model`.
        tile (int): Pixels of a side for which scores are held at once.

    Attributes:
        multiple (tuple[int, int]): In pixels, down and across.

    Raises:
        UserError: The model, or a setting of its config, is none that can be taken apart like this;
            the message says which.
    """

    def __init__(self, model: nn.Module, tile: int = TILE) -> None:
        _check(model)
        self.model, self.backbone = model, cast(VisionMamba, model.backbone)
        self.stride = self.backbone.patch_embed.stride
        channels = [self.backbone.embed_dims] * len(self.backbone.out_indices)
        self.head = TiledHead(model, channels, self.stride)
        align = self.head.align
        self.multiple = self.stride[0] * align, self.stride[1] * align
        self.tile = [max(1, tile // side) * align for side in self.multiple]  # in cells

    @torch.no_grad()
    def __call__(
        self,
        size: tuple[int, int],
        read: Callable[[np.ndarray, np.ndarray], np.ndarray],
        write: Callable[[int, int, np.ndarray], None],
        folder: Path,
        track: Track = lambda items, what: items,
        key: str = '',
    ) -> None:
        """Segment one picture.

        A call that was stopped goes on if it is repeated with the same folder and key: with the
        next tile, once the backbone's maps are complete.

        Args:
            size (tuple[int, int]): Rows and columns of the picture in pixels.
            read (Callable): Rows and columns, as int64 arrays that do not fall, to their pixels
                (rows, columns, 3), uint8, **RGB**.
            write (Callable): Called with the first row, the first column and labels (h, w) of
                int64, for one tile after the other; not again for those of a stopped call.
            folder (Path): For files in the meantime: 4 * C bytes for each patch and each of the
                maps.
            track (Callable): Wraps what takes long, to show how far it is.
            key (str): Says which picture and weights the files in ``folder`` are of.
        """
        align = self.head.align
        grid = -(-size[0] // self.multiple[0]) * align, -(-size[1] // self.multiple[1]) * align
        files = MapFiles(folder, len(self.backbone.out_indices), grid, self.backbone.embed_dims)
        maps, tiles = Record(folder / 'maps.json'), Record(folder / 'tiles.json')
        if maps.read(key, size) is None:
            self._run_backbone(size, grid, read, files, track)
            maps.write(key, size, True)
        windows = [
            Window(top, min(top + self.tile[0], grid[0]), left, min(left + self.tile[1], grid[1]))
            for top in range(0, grid[0], self.tile[0])
            for left in range(0, grid[1], self.tile[1])
        ]
        written = tiles.read(key, size, self.tile) or 0
        with self.head as head:
            if head.pyramid is not None:
                head.pool(track(windows, 'pooling'), grid, files.read)
            for count, window in enumerate(track(windows[written:], 'labels'), written + 1):
                labels = head.labels(window, grid, files.read).cpu().numpy()
                row, column = window.top * self.stride[0], window.left * self.stride[1]
                labels = labels[: size[0] - row, : size[1] - column]
                if labels.size:
                    write(row, column, labels)
                tiles.write(key, size, self.tile, count)

    def _run_backbone(self, size, grid, read, files: MapFiles, track: Track) -> None:
        backbone = self.backbone
        strips = _strips(grid)
        # (B, L, C) as forward has them; what is not needed any more must not be held.
        hidden, places = self._tokens(size, grid, read, track(strips, 'reading'))
        rotation, residual = backbone.rotation(grid), None
        orders = backbone.directions.orders(
            hidden.shape[1], grid, backbone.cls_token_place, hidden.device
        )
        starts = range(0, len(backbone.blocks_run), backbone.directions.blocks_per_step)
        for start in track(starts, 'backbone'):
            if residual is not None and rotation is None:
                # Blocks begin by adding up the two. Done in place it takes a third of the memory.
                hidden, residual = residual.add_(hidden), None
            hidden, residual = backbone.step(start, hidden, residual, rotation, orders)
            index = start + starts.step - 1
            if index in backbone.out_indices:
                parts = (places[top * grid[1] : bottom * grid[1]] for top, bottom in strips)
                files.write(
                    backbone.out_indices.index(index),
                    (backbone.feature(hidden[0, p], residual[0, p], index) for p in parts),
                )

    def _tokens(self, size, grid, read, strips) -> tuple[Tensor, Tensor]:
        """Tokens (1, L, C) of the picture, and the places of its patches in them, (Hp * Wp,)."""
        backbone, embed = self.backbone, self.backbone.patch_embed
        number = grid[0] * grid[1] + len(backbone.cls_token_names)
        device = embed.proj.weight.device
        order = torch.arange(number, device=device)[None, :, None]
        places, others = (
            part[0, :, 0] for part in split_class_tokens(order, backbone.cls_token_place)
        )
        tokens = torch.empty(1, number, backbone.embed_dims, device=device)
        for place, name in zip(others, backbone.cls_token_names, strict=True):
            tokens[0, place] = getattr(backbone, name)[0, 0]
        columns = _pixels(0, grid[1], self.stride[1], size[1])
        for top, bottom in strips:
            rows = _pixels(top, bottom, self.stride[0], size[0])
            pixels = torch.from_numpy(read(rows, columns)).to(device).permute(2, 0, 1).float()
            pixels = normalise(self.model.data_preprocessor, pixels)
            patches = embed.proj(pixels[None])[0].flatten(1).T  # (cells, C)
            tokens[0, places[top * grid[1] : bottom * grid[1]]] = patches
        if backbone.pos_embed is not None:
            place = backbone.cls_token_place
            tokens += resize_pos_embed(backbone.pos_embed, backbone.grid, grid, place)
        return tokens, places


def _strips(grid: tuple[int, int]) -> list[tuple[int, int]]:
    """First and last row (exclusive) of strips of a few rows of cells."""
    height = max(1, STRIP // grid[1])
    return [(top, min(top + height, grid[0])) for top in range(0, grid[0], height)]


def _pixels(first: int, last: int, step: int, side: int) -> np.ndarray:
    """Those of cells first … last - 1 along a side, whose last one is repeated beyond it."""
    return np.arange(first * step, last * step).clip(max=side - 1)


def _check(model: nn.Module) -> None:
    """Refuse what would be computed in another way than elsewhere."""

    def refuse(reason: str) -> None:
        raise UserError(f'this model cannot predict a raster as a whole: {reason}')

    refuse_other_tasks(model.cfg, refuse)
    name = type(model).__name__
    if name != 'EncoderDecoder' or isinstance(model.decode_head, nn.ModuleList):
        refuse(f'it must be an EncoderDecoder with one decode head, got {name}')
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead  # of an extra

    head = type(model.decode_head)
    for method in ('predict', 'predict_by_feat'):
        if getattr(head, method) is not getattr(BaseDecodeHead, method):
            refuse(f'{head.__name__} predicts in a way of its own ({method})')
    backbone = model.backbone
    if not isinstance(backbone, VisionMamba):
        refuse(
            f'its backbone must be a VisionMamba, whose cost is linear in the pixels, got '
            f'{type(backbone).__name__}'
        )
    if backbone.out_type != 'featmap':
        refuse(f"its backbone must have out_type='featmap', got {backbone.out_type!r}")
    embed = backbone.patch_embed
    if embed.stride != embed.patch_size:
        refuse(
            'its patches overlap, and such a backbone resizes the picture, got patch_size='
            f'{embed.patch_size} and stride={embed.stride}'
        )
    if embed.proj.in_channels != 3:
        refuse(f'its backbone must take 3 channels, got {embed.proj.in_channels}')
    mode = model.test_cfg.get('mode', 'whole')
    if mode != 'whole':
        refuse(f'model.test_cfg.mode is {mode}; --cfg-options model.test_cfg.mode=whole changes it')
    pre = model.data_preprocessor
    if type(pre).__name__ != 'SegDataPreProcessor' or pre.test_cfg:
        refuse(
            'its data_preprocessor must be a SegDataPreProcessor without test_cfg, got '
            f'{type(pre).__name__} with test_cfg={getattr(pre, "test_cfg", None)}'
        )
    if model.align_corners:
        refuse('align_corners=True lines up maps with their borders, so that no tile fits another')
    refuse_other_steps(model.cfg, refuse)
