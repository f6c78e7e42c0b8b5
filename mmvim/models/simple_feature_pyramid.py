"""A feature pyramid for backbones with a single scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from .arguments import integer
from .sizes import at_least

__all__ = ['LayerNorm2d', 'SimpleFeaturePyramid']


@MODELS.register_module('LN2d')
class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of (B, C, H, W) maps, at every position by itself."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(
            x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps
        )  # (B, H, W, C)
        # mmcv's RoIAlign reads memory as if it were contiguous, whatever the strides say.
        return x.permute(0, 3, 1, 2).contiguous()  # (B, C, H, W)


class Halve(nn.Module):
    """Maximum of 2 x 2 positions of (B, C, H, W) maps: (B, C, H // 2, W // 2), at least 1 x 1.

    A last row or column of an odd number is left out, so that strides are exact. In a segmentor,
    which stretches maps onto the picture, the cells divide the map evenly.
    """

    evenly = False

    def align_to_picture(self) -> None:
        self.evenly = True

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if self.evenly:
            if torch.compiler.is_compiling():
                return self._halve(self._halve(x, 2), 3)
            return F.adaptive_max_pool2d(x, (max(height // 2, 1), max(width // 2, 1)))
        return F.max_pool2d(x, (min(height, 2), min(width, 2)))

    @staticmethod
    def _halve(x: Tensor, dim: int) -> Tensor:
        """Adaptive pooling along one side. Compilers take the operator for fixed sizes only.

        Cells of an even side are two wide. Those of an odd one are three, the last of which is the
        first of the next cell.
        """
        side = x.shape[dim]
        first = 2 * torch.arange(at_least(side // 2, 1), device=x.device)
        out = x.index_select(dim, first)
        for step in (1, 1 + side % 2):
            out = torch.maximum(out, x.index_select(dim, (first + step).clamp(max=side - 1)))
        return out


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """Maps of one stride to a pyramid, each level straight from the backbone.

    There is no top-down path: in a plain backbone every map already has the whole depth behind
    it (`ViTDet <https://arxiv.org/abs/2203.16527>`_, section 3). Two styles come out of one rule:

    - ``out_channels`` given (ViTDet): the upsampling halves the channels at each step, and a 1x1
      and a 3x3 convolution, each with a norm, bring every level to ``out_channels``.
    - ``out_channels=None`` (UperNet): levels keep their channels, and there are no projections.

    Args:
        in_channels (int | Sequence[int]): Channels of the input maps; one number for all levels,
            or one for each.
        out_channels (int, optional): Channels of every output.
        scales (Sequence[float]): Size of each level relative to its input: 4, 2, 1 or 0.5. With
            the stride 16 of a Vim backbone the defaults give strides 4, 8, 16 and 32.
        num_outs (int, optional): Number of outputs. Above ``len(scales)``, the last level is
            subsampled by 2 for each further one.
        norm_cfg (dict): Norm between the two steps of x4 and after the projections.
        init_cfg (dict, optional): As in mmengine.

    Raises:
        TypeError, ValueError: For scales that cannot be made, a wrong number of channels or of
            outputs.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        out_channels: int | None = None,
        scales: Sequence[float] = (4, 2, 1, 0.5),
        num_outs: int | None = None,
        norm_cfg: dict = dict(type='LN2d'),  # noqa: B006  (never changed)
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        if not isinstance(scales, list | tuple) or not scales:
            raise ValueError(f'scales must be a sequence of numbers, got {scales!r}')
        one = not isinstance(in_channels, list | tuple)
        widths = [in_channels] * len(scales) if one else in_channels
        widths = [integer('in_channels', width) for width in widths]
        if out_channels is not None:
            integer('out_channels', out_channels)
        if len(widths) != len(scales):
            raise ValueError(
                f'in_channels must be one number or {len(scales)}, one for each of '
                f'scales={tuple(scales)}; got {in_channels}'
            )
        num_outs = len(scales) if num_outs is None else integer('num_outs', num_outs)
        if num_outs < len(scales):
            raise ValueError(f'num_outs must be at least len(scales)={len(scales)}, got {num_outs}')
        self.num_outs = num_outs
        self.levels = nn.ModuleList(
            self._level(width, out_channels, scale, norm_cfg)
            for width, scale in zip(widths, scales, strict=True)
        )

    @staticmethod
    def _level(width: int, out_channels: int | None, scale: float, norm_cfg: dict) -> nn.Module:
        """The layers from one input map to the output of one scale."""

        def norm(channels: int) -> nn.Module:
            return build_norm_layer(norm_cfg, channels)[1]

        shrink = 1 if out_channels is None else 2
        if scale == 4:
            half, quarter = width // shrink, width // shrink**2
            if quarter == 0:
                raise ValueError(
                    f'in_channels must be at least 4 at scale 4 with out_channels, got {width}'
                )
            layers = [
                nn.ConvTranspose2d(width, half, 2, 2),
                norm(half),
                nn.GELU(),
                nn.ConvTranspose2d(half, quarter, 2, 2),
            ]
            width = quarter
        elif scale == 2:
            if width < shrink:
                raise ValueError(
                    f'in_channels must be at least 2 at scale 2 with out_channels, got {width}'
                )
            layers = [nn.ConvTranspose2d(width, width // shrink, 2, 2)]
            width = width // shrink
        elif scale == 1:
            layers = []
        elif scale == 0.5:
            layers = [Halve()]
        else:
            raise ValueError(f'scales must be out of 4, 2, 1 and 0.5, got {scale}')
        if out_channels is not None:
            layers += [
                nn.Conv2d(width, out_channels, 1, bias=False),
                norm(out_channels),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                norm(out_channels),
            ]
        return nn.Sequential(*layers)

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
        """One (B, C, H, W) map, or one per scale, to ``num_outs`` maps of falling size.

        Raises:
            ValueError: For a number of maps that is neither one nor that of the scales.
        """
        maps = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        if len(maps) == 1:
            maps *= len(self.levels)
        if len(maps) != len(self.levels):
            raise ValueError(
                f'SimpleFeaturePyramid takes 1 or {len(self.levels)} maps, got {len(maps)}; '
                "check the backbone's out_indices"
            )
        outs = [level(x) for level, x in zip(self.levels, maps, strict=True)]
        while len(outs) < self.num_outs:
            outs.append(F.max_pool2d(outs[-1], kernel_size=1, stride=2))
        return tuple(outs)
