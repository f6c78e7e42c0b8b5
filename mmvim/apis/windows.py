"""Segmenting a raster in independent overlapping windows whose scores are blended.

This is the usual way, for segmentors of any backbone and head. A place depends on the windows that
it lies in and on nothing else. :mod:`.whole` is the other way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mmvim.utils.launch import UserError

from .pipelines import refuse_other_steps, refuse_other_tasks
from .record import Record, Track

__all__ = ['WindowedSegmentor', 'blending_weights', 'window_starts']


def window_starts(length: int, side: int, overlap: int) -> list[int]:
    """Where windows begin along a side of a raster.

    As few as overlap by ``overlap`` pixels or more, spread evenly; one for a shorter raster.

    Args:
        length (int): Pixels of the raster along it.
        side (int): Pixels of a window along it.
        overlap (int): Less than ``side``.
    """
    if length <= side:
        return [0]
    gaps = -(-(length - side) // (side - overlap))
    return [k * (length - side) // gaps for k in range(gaps + 1)]


def blending_weights(starts: list[int], side: int) -> Tensor:
    """What the windows count along a side: (windows, side), float64, which adds up to 1 everywhere.

    Weights rise from a window's edges as ``sin(pi / 2 * x) ** 2``, x from 0 to 1 over the widest
    overlap, and are divided by the sum of those that lie on a place. Those of the plane are the
    products of those along its sides, and so add up to 1, too.
    """
    weights = torch.ones(side, dtype=torch.float64)
    if len(starts) > 1:
        widest = side - min(b - a for a, b in pairwise(starts))
        x = ((torch.arange(side, dtype=torch.float64) + 0.5) / max(widest, 1)).clamp(max=1)
        rise = (torch.pi / 2 * x).sin() ** 2
        weights = rise * rise.flip(0) if widest else weights
    total = torch.zeros(starts[-1] + side, dtype=torch.float64)
    for start in starts:
        total[start : start + side] += weights
    return torch.stack([weights / total[start : start + side] for start in starts])


class WindowedSegmentor:
    """A segmentor for rasters of any size that sees one window at a time.

    Scores (before the softmax, as mmseg's mode ``slide`` takes them) are averaged with
    :func:`blending_weights`; labels are the best of each pixel. Only the scores of a few windows
    are held. Those of rows that the next row of windows covers, too, go into a file.

    Args:
        model (nn.Module): From :func:`~mmvim.apis.load_model`, a segmentor of mmseg. Mode and
            windows of its ``test_cfg`` are not used.
        side (int): Of a window, in pixels. A side of the raster that is shorter makes windows as
            short.
        overlap (int, optional): The least of neighbours, in pixels. Default: a quarter of ``side``.
        batch_size (int): Windows in one pass.

    Raises:
        UserError: A number is out of range, or the model is no segmentor of mmseg whose best
            scores are its labels.
    """

    def __init__(
        self, model: nn.Module, side: int, overlap: int | None = None, batch_size: int = 1
    ) -> None:
        overlap = side // 4 if overlap is None else overlap
        if side < 1 or batch_size < 1:
            raise UserError(f'windows and batch_size must be positive, got {side} and {batch_size}')
        if not 0 <= overlap < side:
            raise UserError(
                f'the overlap of windows must be from 0 to less than their side ({side}), got '
                f'{overlap}'
            )
        _check(model)
        self.model, self.side, self.overlap, self.batch_size = model, side, overlap, batch_size
        self.device = next(model.parameters()).device

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
        """Segment one picture; arguments as of ``WholeSegmentor``.

        A call that was stopped goes on with the row of windows that it was in. ``folder`` gets
        8 bytes for each class and each pixel of one row's overlap with the next.
        """
        sides = [min(self.side, length) for length in size]
        starts = [window_starts(length, self.side, self.overlap) for length in size]
        down, across = (
            blending_weights(*both).float().to(self.device)
            for both in zip(starts, sides, strict=True)
        )
        (tops, lefts), (height, width) = starts, sides
        # Pixels until the next window begins, after which nothing is added.
        rows, columns = (
            [b - a for a, b in pairwise([*begin, length])]
            for begin, length in zip(starts, size, strict=True)
        )
        record = Record(folder / 'windows.json')
        done = record.read(key, size, self.side, self.overlap) or 0
        batches = [
            (k, range(first, min(first + self.batch_size, len(lefts))))
            for k in range(done, len(tops))
            for first in range(0, len(lefts), self.batch_size)
        ]
        for k, some in track(batches, 'windows'):
            if some[0] == 0:
                strip = Strip(folder, k, height - rows[k - 1] if k else 0, rows[k])
            lines = np.arange(tops[k], tops[k] + height)
            pictures = [read(lines, np.arange(lefts[j], lefts[j] + width)) for j in some]
            for j, scores in zip(some, self._scores(pictures), strict=True):
                scores = scores.float() * down[k][:, None] * across[j]
                labels = self._labels(strip.add(scores, columns[j]))
                write(tops[k], lefts[j], labels.cpu().numpy())
            if some[-1] == len(lefts) - 1:
                record.write(key, size, self.side, self.overlap, k + 1)

    def _scores(self, pictures: list[np.ndarray]) -> Tensor:
        """RGB pictures (h, w, 3) of one size to scores (B, classes, h, w)."""
        from mmseg.structures import SegDataSample  # of an extra

        size = pictures[0].shape[:2]
        inputs = [torch.from_numpy(x[..., ::-1].copy()).permute(2, 0, 1) for x in pictures]
        samples = [SegDataSample(metainfo=dict(img_shape=size, ori_shape=size)) for _ in inputs]
        batch = self.model.data_preprocessor(dict(inputs=inputs, data_samples=samples), False)
        metas = [sample.metainfo for sample in batch['data_samples']]
        scores = self.model.encode_decode(batch['inputs'], metas)
        left, _, top, _ = metas[0].get('img_padding_size', (0, 0, 0, 0))
        return scores[..., top : top + size[0], left : left + size[1]]

    def _labels(self, scores: Tensor) -> Tensor:
        """(classes, h, w) to (h, w)."""
        if len(scores) > 1:
            return scores.argmax(0)
        head = self.model.decode_head
        head = head[-1] if isinstance(head, nn.ModuleList) else head
        return (scores[0].sigmoid() > head.threshold).long()


class Strip:
    """A row of windows, whose scores are added up from left to right.

    Args:
        folder (Path): For the scores of rows that windows of two strips cover.
        number (int): Of the strip, from 0 on.
        above (int): Rows that the strip above covers, too.
        rows (int): Rows that are complete with this strip.
    """

    def __init__(self, folder: Path, number: int, above: int, rows: int) -> None:
        # Column after column, so that windows read and write them from the first to the last byte.
        self.upper, self.lower = (folder / f'overlap-{k % 2}.float32' for k in (number - 1, number))
        self.lower.write_bytes(b'')
        self.above, self.rows = above, rows
        self.offset = 0  # in the upper one
        self.left: Tensor | None = None  # sums of what lies in the next window, too

    def add(self, scores: Tensor, columns: int) -> Tensor:
        """Add the next window's weighted scores (classes, h, w).

        Args:
            scores (Tensor): Changed in place.
            columns (int): Columns that are complete with this window.

        Returns:
            Tensor: What is complete, (classes, rows, columns).
        """
        if self.left is not None:
            scores[..., : self.left.shape[2]] += self.left
        self.left = scores[..., columns:].clone()
        scores = scores[..., :columns]
        if self.above:
            shape = columns, len(scores), self.above
            values = np.fromfile(self.upper, np.float32, math.prod(shape), offset=self.offset)
            self.offset += values.nbytes
            values = torch.from_numpy(values.reshape(shape)).permute(1, 2, 0)
            scores[:, : self.above] += values.to(scores.device)
        with open(self.lower, 'ab') as file:
            scores[:, self.rows :].permute(2, 0, 1).contiguous().cpu().numpy().tofile(file)
        return scores[:, : self.rows]


def _check(model: nn.Module) -> None:
    """Refuse what would be computed in another way than elsewhere."""

    def refuse(reason: str) -> None:
        raise UserError(f'this model cannot predict a raster in windows: {reason}')

    refuse_other_tasks(model.cfg, refuse)
    from mmseg.models.segmentors.base import BaseSegmentor  # of an extra

    name = type(model).__name__
    if not isinstance(model, BaseSegmentor) or not hasattr(model, 'encode_decode'):
        refuse(f'it must be an EncoderDecoder of mmseg, got {name}')
    if type(model).postprocess_result is not BaseSegmentor.postprocess_result:
        refuse(f'{name} makes its result of the scores in a way of its own (postprocess_result)')
    refuse_other_steps(model.cfg, refuse)
