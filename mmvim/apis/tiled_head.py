"""Neck and head of a segmentor on one part of the backbone's maps after the other.

A head of convolutions sees no farther than some cells. Given a part of the maps with as many cells
around it, it predicts for the part what it predicts from whole maps. How far a head sees is found
out by its gradient, and a trial on random maps makes sure of it. Pooling over the whole map, as
UperNet and PSPNet have it, is computed beforehand, from part to part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmvim.utils.launch import UserError

from .prediction import best_class

__all__ = ['TiledHead', 'Window', 'resize_window']

Maps = Sequence[Tensor]
# Sides, in cells, of the random maps on which a head is tried; it must not see across the largest.
TRIAL_SIDES = (32, 64)


class Window(NamedTuple):
    """Cells of a map: rows top … bottom - 1, columns left … right - 1."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def size(self) -> tuple[int, int]:
        return self.bottom - self.top, self.right - self.left

    def grown(self, cells: int, grid: tuple[int, int]) -> Window:
        """With so many cells on every side, as far as the map has them."""
        return Window(
            max(self.top - cells, 0),
            min(self.bottom + cells, grid[0]),
            max(self.left - cells, 0),
            min(self.right + cells, grid[1]),
        )

    def within(self, outer: Window, factor: float = 1) -> tuple[slice, slice]:
        """Its place in a map of ``outer`` that has ``factor`` times as many cells a side."""
        top, bottom = self.top - outer.top, self.bottom - outer.top
        left, right = self.left - outer.left, self.right - outer.left
        return (
            slice(int(top * factor), int(bottom * factor)),
            slice(int(left * factor), int(right * factor)),
        )


class TiledHead:
    """Labels of a part of a picture from the backbone's maps of that part and some cells around it.

    A context, as the head's pooling is replaced in the meantime.

    Args:
        model (nn.Module): A segmentor with one head.
        channels (Sequence[int]): Of each map of the backbone.
        stride (tuple[int, int]): Pixels to a cell, down and across.

    Attributes:
        align (int): Windows must begin and end at multiples of this, and so must the map.
        halo (int): Cells that the head needs around a window.

    Raises:
        UserError: The head sees the whole map in another way than by mmseg's pooling pyramid, or
            its scores do not divide a cell evenly.
    """

    def __init__(self, model: nn.Module, channels: Sequence[int], stride: tuple[int, int]) -> None:
        self.neck = model.neck if model.with_neck else None
        self.head = model.decode_head
        self.stride = stride
        self.device = next(model.parameters()).device
        from mmseg.models.decode_heads.psp_head import PPM  # of an extra

        pyramid = getattr(self.head, 'psp_modules', None)
        self.pyramid = pyramid if isinstance(pyramid, PPM) else None
        self.pooled: list[Tensor] | None = None
        self.window, self.grid = Window(0, 0, 0, 0), (0, 0)
        with self:
            self._try(channels)

    def __enter__(self) -> TiledHead:
        if self.pyramid is not None:
            self.pyramid.forward = self._pooled_maps
        return self

    def __exit__(self, *error) -> None:
        if self.pyramid is not None:
            del self.pyramid.forward  # that of the class is left

    def pool(
        self,
        windows: Iterable[Window],
        grid: tuple[int, int],
        read: Callable[[Window], Maps],
    ) -> None:
        """Compute what the head pools over the whole map, if it does.

        Args:
            windows (Iterable[Window]): They cover the map, each cell once.
            grid (tuple[int, int]): Cells of the map, down and across.
            read (Callable): The maps (1, C, h, w) of a window.
        """
        if self.pyramid is None:
            return
        sums: list[Tensor] = []
        for window in windows:
            outer = window.grown(self.halo, grid)
            x = self._pyramid_input(read(outer))
            factor = x.shape[2] / outer.size[0]
            rows, columns = window.within(outer, factor)
            part = x[0, :, rows, columns].double()
            sides = round(grid[0] * factor), round(grid[1] * factor)
            bins = [level[0].output_size for level in self.pyramid]
            sums = sums or [part.new_zeros(len(part), k, k) for k in bins]
            start = round(window.top * factor), round(window.left * factor)
            for k, total in zip(bins, sums, strict=True):
                across = _shares(k, sides[1], start[1], part.shape[2], part)
                total += _shares(k, sides[0], start[0], part.shape[1], part) @ part @ across.T
        levels = zip(self.pyramid, sums, strict=True)
        self.pooled = [level[1:](total[None].float()) for level, total in levels]

    def labels(
        self, window: Window, grid: tuple[int, int], read: Callable[[Window], Maps]
    ) -> Tensor:
        """Classes (h, w) of the pixels of a window, int64.

        Args:
            window (Window): In cells.
            grid (tuple[int, int]): Cells of the whole map.
            read (Callable): The maps (1, C, h, w) of a window.
        """
        outer = window.grown(self.halo, grid)
        scores = self._scores(read(outer), outer, grid)
        # Pixels at the edge of a window lie between its scores and the next.
        ring = window.grown(self.align, grid)
        rows, columns = ring.within(outer, self.factor)
        down, across = self.stride
        size = ring.size[0] * down, ring.size[1] * across
        scores = scores[0, :, rows, columns]
        if len(scores) > 1:
            labels = best_class(scores, size, False)[0]
        else:
            (scores,) = nn.functional.interpolate(scores[None], size, mode='bilinear')[0]
            labels = (scores.sigmoid() > self.head.threshold).long()
        top, left = (window.top - ring.top) * down, (window.left - ring.left) * across
        return labels[top : top + window.size[0] * down, left : left + window.size[1] * across]

    def _features(self, maps: Maps) -> Maps:
        maps = [x.to(self.device) for x in maps]
        return maps if self.neck is None else self.neck(maps)

    def _scores(self, maps: Maps, window: Window, grid: tuple[int, int]) -> Tensor:
        """(1, classes, h, w) of the maps of a window."""
        self.window, self.grid = window, grid
        return self.head.forward(self._features(maps))

    def _pyramid_input(self, maps: Maps) -> Tensor:
        x = self.head._transform_inputs(self._features(maps))
        return x[-1] if isinstance(x, list | tuple) else x

    def _pooled_maps(self, x: Tensor) -> list[Tensor]:
        """In place of the pyramid's own: its maps at the window, each (1, C, h, w)."""
        if self.pooled is None:  # in trials
            return [x.new_zeros(1, self.pyramid.channels, *x.shape[2:]) for _ in self.pyramid]
        factor = x.shape[2] / self.window.size[0]
        size = round(self.grid[0] * factor), round(self.grid[1] * factor)
        window = Window(*(round(side * factor) for side in self.window))
        return [resize_window(small, size, window) for small in self.pooled]

    # Trials -----------------------------------------------------------------------------------

    def _try(self, channels: Sequence[int]) -> None:
        """Find ``align``, ``factor`` and ``halo``."""
        name = type(self.head).__name__
        for side in TRIAL_SIDES:
            random = torch.Generator().manual_seed(0)
            maps = [torch.randn(1, width, side, side, generator=random) for width in channels]
            with torch.no_grad():
                # Of maps that the head does not take, too: it may take none of a lower resolution.
                coarsest = min(min(x.shape[-2:]) for x in self._features(maps))
            self.align = -(-side // coarsest)
            reach = self._reach(maps, side)
            if reach is not None:
                self.halo = -(-reach // self.align) * self.align
                if self._fits(maps, side):
                    return
                break
        raise UserError(
            f'{name} cannot predict a raster in parts: what it predicts for a place depends on all '
            'of the map, or on where the map begins. Heads of convolutions, UPerHead and PSPHead '
            'can, with norms that do not take the mean over places'
        )

    def _reach(self, maps: Maps, side: int) -> int | None:
        """How many cells around a place matter to it; None if there may be more than there are."""
        whole, middle = Window(0, side, 0, side), side // 2 // self.align * self.align
        with torch.enable_grad():
            maps = [x.requires_grad_() for x in maps]
            scores = self._scores(maps, whole, (side, side))
            self.factor = self._factor(scores.shape[-2] / side)
            block = Window(middle, middle + self.align, middle, middle + self.align)
            rows, columns = block.grown(self.align, (side, side)).within(whole, self.factor)
            some = scores[..., rows, columns]
            weights = torch.randn(some.shape, generator=torch.Generator().manual_seed(1))
            total = (some * weights.to(some.device)).sum()
            gradients = torch.autograd.grad(total, maps, allow_unused=True)
        seen = [g.abs().sum((0, 1)) > 0 for g in gradients if g is not None]
        lines = [line for x in seen for line in (x.any(0).nonzero(), x.any(1).nonzero())]
        first, last = min(int(x.min()) for x in lines), max(int(x.max()) for x in lines)
        if first == 0 or last == side - 1:
            return None
        return max(middle - first, last - (middle + self.align - 1))

    def _factor(self, factor: float) -> float:
        """Scores to a cell's side, checked."""
        pixels = [step / factor for step in self.stride]
        if factor * self.align % 1 or any(side % 1 for side in pixels):
            raise UserError(
                f'{type(self.head).__name__} gives {factor:g} scores to a side of a cell of '
                f'{self.stride[0]} x {self.stride[1]} pixels; to predict a raster in parts, every '
                'score must stand for whole pixels'
            )
        return factor

    def _fits(self, maps: Maps, side: int) -> bool:
        """Whether a window off the middle gets the scores that whole maps give it."""
        grid, start = (side, side), self.halo + self.align
        whole = Window(0, side, 0, side)
        window = Window(start, start + self.align, 0, self.align)
        outer = window.grown(self.halo, grid)
        with torch.no_grad():
            place = (..., *window.within(whole, self.factor))
            expected = self._scores(maps, whole, grid)[place]
            rows, columns = outer.within(whole)
            part = [x[..., rows, columns] for x in maps]
            place = (..., *window.within(outer, self.factor))
            given = self._scores(part, outer, grid)[place]
        return torch.allclose(given, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def _shares(bins: int, side: int, start: int, length: int, like: Tensor) -> Tensor:
    """(bins, length): what each of ``length`` cells from ``start`` on adds to each bin's mean.

    Bins overlap where they do not divide the side, as those of ``F.adaptive_avg_pool2d`` do.
    """
    cells = torch.arange(start, start + length, device=like.device)
    rows = []
    for k in range(bins):
        first, last = k * side // bins, -(-(k + 1) * side // bins)
        rows.append(((cells >= first) & (cells < last)).to(like.dtype) / (last - first))
    return torch.stack(rows)


def resize_window(x: Tensor, size: tuple[int, int], window: Window) -> Tensor:
    """A window of ``F.interpolate(x, size, mode='bilinear', align_corners=False)``.

    Args:
        x (Tensor): (B, C, h, w).
        size (tuple[int, int]): That of the whole result.
        window (Window): Cells of the result.

    Returns:
        Tensor: (B, C, rows, columns) of the window.
    """
    for dim, low, high in ((2, window.top, window.bottom), (3, window.left, window.right)):
        length = x.shape[dim]
        places = torch.arange(low, high, device=x.device, dtype=torch.float64)
        places = ((places + 0.5) * (length / size[dim - 2]) - 0.5).clamp(0, length - 1)
        before = places.long()
        after = (before + 1).clamp(max=length - 1)
        share = (places - before).to(x.dtype)
        share = share[:, None] if dim == 2 else share
        x = x.index_select(dim, before) * (1 - share) + x.index_select(dim, after) * share
    return x
