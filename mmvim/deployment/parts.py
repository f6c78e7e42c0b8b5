"""What is exported of a model: from a picture's pixels to tensors, without data samples."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmvim.models.mamba_mixer import MambaMixer
from mmvim.utils.errors import UserError
from mmvim.utils.preprocessing import normalise

__all__ = ['PARTS', 'Part', 'part_of']

PARTS = ('model', 'backbone')


class Part(nn.Module):
    """Pixels to the outputs of a part of a model.

    Takes (B, 3, H, W) pictures in RGB, float32 from 0 to 255, and normalises them as the model's
    preprocessor does. Returns a tuple of tensors, whose names are :attr:`names`.

    Args:
        model (nn.Module): Of mmseg, mmdet or mmpretrain; it is copied, not changed.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        pool_by_products(self.model)

    #: Of the outputs, in their order.
    names: tuple[str, ...]

    def normalise(self, images: Tensor) -> Tensor:
        return normalise(self.model.data_preprocessor, images)

    @property
    def stride(self) -> int:
        """The largest step between patches in pixels; sizes below a few of them are special."""
        step = getattr(getattr(self.model.backbone, 'patch_embed', None), 'stride', (32, 32))
        return max(step)

    def of_operations(self) -> Part:
        """A copy whose mixers are made of single operations, and do not insist on a backend."""
        part = copy.deepcopy(self)
        for module in part.modules():
            if isinstance(module, MambaMixer):
                module.backend, module.recompute = None, 'none'
        return part


class Features(Part):
    """Feature maps of the backbone and, with ``neck``, of what follows it."""

    def __init__(self, model: nn.Module, neck: bool) -> None:
        super().__init__(model)
        self.extract = self.model.extract_feat if neck else self.model.backbone
        side = 4 * self.stride
        with torch.no_grad():
            maps = self(torch.zeros(1, 3, side, side, device=next(model.parameters()).device))
        self.names = tuple(f'feature{k}' for k in range(len(maps)))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.extract(self.normalise(images)))


class Segmentor(Part):
    """Scores (B, classes, H, W) before the softmax and labels (B, H, W) at the pictures' size."""

    names = ('logits', 'labels')

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        head = self.model.decode_head
        logits = head(self.model.extract_feat(self.normalise(images)))
        logits = F.interpolate(
            logits, images.shape[-2:], mode='bilinear', align_corners=bool(head.align_corners)
        )
        if head.out_channels == 1:
            return logits, (logits.sigmoid() > head.threshold)[:, 0].long()
        return logits, logits.argmax(1)


class Classifier(Part):
    """Scores (B, classes) before the softmax."""

    names = ('logits',)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (self.model.head(self.model.extract_feat(self.normalise(images))),)


def part_of(model: nn.Module, part: str = 'model') -> Part:
    """The part of a model that is exported.

    Args:
        model (nn.Module): As :func:`mmvim.apis.load_model` gives it.
        part (str): ``'model'``: a segmentor's logits and labels, a classifier's logits, a
            detector's features after the neck (boxes are found by code that no format takes).
            ``'backbone'``: the maps of the backbone.

    Raises:
        ValueError: ``part`` is neither.
        UserError: A segmentor has several decode heads, one after the other.
    """
    if part not in PARTS:
        raise ValueError(f'part must be one of {", ".join(PARTS)}, got {part!r}')
    if part == 'backbone':
        return Features(model, neck=False)
    if hasattr(model, 'decode_head'):
        if isinstance(model.decode_head, nn.ModuleList):
            raise UserError('a cascade of decode heads cannot be exported: use --part backbone')
        return Segmentor(model)
    if hasattr(model, 'head') and not hasattr(model, 'bbox_head'):
        return Classifier(model)
    return Features(model, neck=True)


class PoolByProducts(nn.Module):
    """``nn.AdaptiveAvgPool2d`` as two matrix products, which formats take for any input size."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, *size)."""
        down, across = (
            self.weights(cells, length, x)
            for cells, length in zip(self.size, x.shape[-2:], strict=True)
        )
        return down @ x @ across.transpose(0, 1)

    @staticmethod
    def weights(cells: int, length: int, like: Tensor) -> Tensor:
        """(cells, length): cell i is the mean of [⌊i · length / cells⌋, ⌈(i + 1) · …⌉)."""
        cell = torch.arange(cells, device=like.device)[:, None]
        place = torch.arange(length, device=like.device)[None]
        start = cell * length // cells
        end = ((cell + 1) * length + cells - 1) // cells
        inside = ((place >= start) & (place < end)).to(like.dtype)
        return inside / inside.sum(1, keepdim=True)


def pool_by_products(model: nn.Module) -> None:
    """Replace adaptive pooling in a model where its result has a fixed size above 1."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.AdaptiveAvgPool2d:
                size = child.output_size
                size = (size, size) if isinstance(size, int) else (size[0], size[1])
                if size != (1, 1) and None not in size:
                    setattr(module, name, PoolByProducts(size))
