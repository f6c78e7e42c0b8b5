"""Vision Mamba (Vim): a pure state-space backbone for images.

Read from top to bottom: block, backbone. The token mixer inside a block is in ``mamba_mixer.py``;
what the backbone shares with other plain ones (arguments, tokens, loading) in
``plain_backbone.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from mmcv.cnn.bricks import DropPath
from mmengine.registry import MODELS
from torch import Tensor, nn

from mmvim_ops import available_backends

from .arguments import flags, number, one_of, pair
from .directions import DIRECTIONS
from .mamba_mixer import MambaMixer, is_plain, widen
from .plain_backbone import PlainBackbone, drop_path_rates
from .rotary import RotaryEmbedding2D
from .sequence import insert_class_tokens

__all__ = ['VimBlock', 'VisionMamba']


def build_norm(norm: str, dims: int) -> nn.Module:
    return nn.RMSNorm(dims, eps=1e-5) if norm == 'rms' else nn.LayerNorm(dims, eps=1e-5)


class VimBlock(nn.Module):
    """Add, normalise, mix: one block of Vim.

    The residual stream is kept in float32 (or wider) whatever autocast does to the mixer.

    Args:
        mixer (nn.Module): Maps (B, L, C) to (B, L, C).
        norm (nn.Module): Normalises the residual stream.
        drop_path (float): Probability of dropping the previous block's output for a whole sample.
    """

    def __init__(self, mixer: nn.Module, norm: nn.Module, drop_path: float = 0.0) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm = norm
        self.drop_path = DropPath(drop_path)

    def forward(
        self, hidden: Tensor, residual: Tensor | None, *orders: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Previous mixer output and residual stream, both (B, L, C), to those after this block.

        ``orders`` go to the mixer; most directions have none.
        """
        if residual is None:
            residual = widen(hidden)
        else:
            residual = residual + self.drop_path(hidden)
        tokens = residual.to(self.norm.weight.dtype)
        # A plain norm goes into the mixer's op, which computes it again in the backward pass.
        if is_plain(self.mixer, MambaMixer) and is_plain(self.norm, nn.RMSNorm) and self.norm.eps:
            return self.mixer(tokens, *orders, norm=self.norm), residual
        return self.mixer(self.norm(tokens), *orders), residual


@MODELS.register_module()
class VisionMamba(PlainBackbone):
    """Vision Mamba backbone (`paper <https://arxiv.org/abs/2401.09417>`_).

    An image becomes a row-major sequence of patches, class tokens and a learned position
    embedding are added, and blocks of bidirectional selective scans mix the sequence at a cost
    linear in its length. Any input size works: the position embedding is resized to the input's
    grid, and ``remainder`` says what happens to sides that the patches do not cover exactly.

    Args:
        arch (str | dict): ``'tiny'``, ``'small'``, ``'base'`` are the paper's; ``'nano'`` (about a
            million parameters) is this project's own, for trainings on a CPU. Or a dict with
            ``embed_dims`` and ``depth`` and optionally ``d_state`` (16), ``d_conv`` (4),
            ``expand`` (2).
        img_size (int | tuple[int, int]): Size (H, W) whose grid the position embedding is stored
            for.
        patch_size (int | tuple[int, int]): Sides of a patch in pixels.
        stride (int | tuple[int, int], optional): Steps between patches in pixels; ``patch_size`` if
            not given.
        in_channels (int): Channels of the input image.
        directions (str): How the sequence is scanned. ``'ssm_conv'`` (default) gives every block a
            backward convolution and scan of its own; ``'ssm'`` a backward scan that shares all but
            A; ``'block'`` pairs the blocks, the second of each pair reading backward;
            ``'sequence'`` scans forward only but flips the sequence at random in training;
            ``'none'`` scans forward only; ``'cross'`` is ``'ssm_conv'``, but the backward scan
            reads the patches column by column.
        reduction (str): ``'mean'`` or ``'sum'`` of the two directions of ``'ssm_conv'`` and
            ``'cross'``. All released weights use the mean; the sum tends to overflow under mixed
            precision.
        cls_token (str, optional): ``'middle'``, ``'head'``, ``'double'`` (head and tail) or None.
        pos_embed (bool): Add a learned absolute position embedding.
        rope (bool): Rotate the hidden states by 2-D position before every block.
        rope_residual (bool): Rotate the residual stream too.
        rope_grid (int, optional): Grid side that rotary positions are scaled to;
            ``img_size // patch_size`` if not given.
        norm (str): ``'rms'`` or ``'layer'``.
        layer_scale (float, optional): Initial value of a learned scale on every mixer's output.
        drop_rate (float): Dropout after the position embedding.
        drop_path_rate (float): Stochastic depth, growing linearly to this rate at the last block.
        out_type (str): ``'featmap'``: (B, C, Hp, Wp) without class tokens; ``'cls_token'``: (B, C),
            the mean of the two for ``'double'``; ``'avg_featmap'``: (B, C), the mean over patches;
            ``'raw'``: (B, M, C), the whole sequence.
        out_indices (int | Sequence[int]): Blocks, counted from 0 (or from -1 backward), whose
            output is returned. With ``directions='block'`` each must end a pair. Blocks after the
            last of them are neither run nor trained.
        feature_source (str): ``'residual'`` returns the residual stream after a block,
            ``'mixer'`` the output of the block's mixer alone, which is never normalised.
        final_norm (bool): Normalise the residual stream at the last out index.
        frozen_stages (int): -1 freezes nothing, 0 the embeddings, n > 0 the first n blocks as well.
        with_cp (bool): Recompute each block in the backward pass instead of storing what is
            inside it.
        recompute (str): What each mixer computes again in the backward pass instead of storing it:
            ``'activations'``, ``'all'`` or ``'none'``, see :func:`mmvim_ops.mamba_mixer`.
        backend (str, optional): What computes the scans, see :func:`mmvim_ops.selective_scan`.
        remainder (str, optional): What happens to sides that the patches do not cover exactly.
            ``'pad'``: zeros at the right and bottom, so that cell i of a map begins at pixel
            i * stride, as detectors assume. ``'resize'``: the picture is resized (bilinear) so that
            n cells divide its side evenly, as segmentors assume that stretch a map onto the
            picture; with ``stride`` below ``patch_size`` that takes place at any size, and the
            picture's border is repeated outside for half of the overlap. None: ``'resize'`` in
            segmentors of mmseg, ``'pad'`` elsewhere.
        init_cfg (dict, optional): ``dict(type='Pretrained', checkpoint=FILE)`` takes files of this
            project and official ``.pth`` files alike; see :mod:`mmvim.models.pretrained`.

    Raises:
        TypeError, ValueError: For an argument outside of the choices above; the message names it.
    """

    arch_zoo = {
        'nano': dict(embed_dims=96, depth=12),
        'tiny': dict(embed_dims=192, depth=24),
        'small': dict(embed_dims=384, depth=24),
        'base': dict(embed_dims=768, depth=24),
    }
    arch_defaults = dict(d_state=16, d_conv=4, expand=2)

    def __init__(
        self,
        arch: str | dict = 'tiny',
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        stride: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        directions: str = 'ssm_conv',
        reduction: str = 'mean',
        cls_token: str | None = 'middle',
        pos_embed: bool = True,
        rope: bool = False,
        rope_residual: bool = False,
        rope_grid: int | None = None,
        norm: str = 'rms',
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_type: str = 'featmap',
        out_indices: int | Sequence[int] = -1,
        feature_source: str = 'residual',
        final_norm: bool = True,
        frozen_stages: int = -1,
        with_cp: bool = False,
        recompute: str = 'activations',
        backend: str | None = None,
        remainder: str | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        arch = self.parse_arch(arch)
        dims, depth = arch['embed_dims'], arch['depth']
        one_of('directions', directions, tuple(DIRECTIONS))
        one_of('reduction', reduction, ('mean', 'sum'))
        one_of('norm', norm, ('rms', 'layer'))
        one_of('feature_source', feature_source, ('residual', 'mixer'))
        one_of('recompute', recompute, ('activations', 'all', 'none'))
        one_of('backend', backend, (None, *available_backends()))
        flags(rope=rope, rope_residual=rope_residual, final_norm=final_norm)
        if not rope and (rope_residual or rope_grid is not None):
            raise ValueError(
                f'rope_residual={rope_residual} and rope_grid={rope_grid} need rope=True'
            )
        mixed = feature_source == 'mixer' and out_type == 'featmap'
        # A block drops the output of the one before it, so the rates are shifted by one.
        rates = [0.0, *drop_path_rates(drop_path_rate, depth)]

        def build_block(index: int, grid: tuple[int, int]) -> VimBlock:
            mixer = MambaMixer(
                directions=directions,
                reduction=reduction,
                layer_scale=layer_scale,
                recompute=recompute,
                backend=backend,
                **arch,
            )
            return VimBlock(mixer, build_norm(norm, dims), rates[index])

        super().__init__(
            arch=arch,
            build_block=build_block,
            norm=build_norm(norm, dims) if final_norm and not mixed else None,
            img_size=img_size,
            patch_size=patch_size,
            stride=stride,
            in_channels=in_channels,
            cls_token=cls_token,
            pos_embed=pos_embed,
            drop_rate=drop_rate,
            out_type=out_type,
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            with_cp=with_cp,
            remainder=remainder,
            init_cfg=init_cfg,
        )
        self.directions, self.feature_source = DIRECTIONS[directions], feature_source
        self._check_directions(out_indices)
        self.drop_path = DropPath(rates[-1])
        self.rope, self.rope_residual = None, rope_residual
        if rope:
            side = pair('img_size', img_size)[0] // self.patch_embed.patch_size[0]
            rope_grid = number('rope_grid', side if rope_grid is None else rope_grid)
            self.rope = RotaryEmbedding2D(dims, rope_grid)

    def _check_directions(self, out_indices: int | Sequence[int]) -> None:
        """Refuse what the directions cannot give."""
        name, step = self.directions.name, self.directions.blocks_per_step
        if self.depth % step:
            raise ValueError(
                f'directions={name!r} takes {step} blocks at a time: depth must be a multiple, '
                f'got {self.depth}'
            )
        if any((index + 1) % step for index in self.out_indices):
            raise ValueError(
                f'with directions={name!r} out_indices must end a group of {step} blocks '
                f'(index + 1 a multiple of it), got {out_indices}'
            )
        if (
            not self.directions.reads_backward
            and self.cls_token_place == 'head'
            and self.out_type == 'cls_token'
        ):
            raise ValueError(
                f'directions={name!r} reads forward only: a class token at the head sees no patch. '
                "With out_type='cls_token' expected cls_token='middle' or 'double', got 'head'"
            )

    @property
    def traits(self) -> str:
        return f'directions={self.directions.name!r}, {super().traits}'

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Features of (B, in_channels, H, W) images, one tensor per out index.

        Their shapes follow ``out_type``; (Hp, Wp) is the grid of patches, padding included.
        """
        hidden, grid = self._embed(x)  # (B, L, C), (Hp, Wp)
        rotation = self.rotation(grid)
        orders = self.directions.orders(hidden.shape[1], grid, self.cls_token_place, x.device)
        flipped = self.training and self.directions.flips()
        if flipped:
            hidden = hidden.flip(1)
            rotation = None if rotation is None else tuple(table.flip(0) for table in rotation)

        features, residual, step = [], None, self.directions.blocks_per_step
        for start in range(0, len(self.blocks_run), step):
            hidden, residual = self.step(start, hidden, residual, rotation, orders)
            index = start + step - 1
            if index in self.out_indices:
                feature = self.feature(hidden, residual, index)
                features.append(self._shape(feature.flip(1) if flipped else feature, grid))
        return tuple(features)

    def step(
        self,
        start: int,
        hidden: Tensor,
        residual: Tensor | None,
        rotation: tuple[Tensor, Tensor] | None,
        orders: tuple[Tensor | None, ...],
    ) -> tuple[Tensor, Tensor]:
        """Run block ``start`` and those that its directions take with it.

        Args:
            start (int): Index of the first of them.
            hidden (Tensor): (B, L, C), what the blocks before return; at first the tokens.
            residual (Tensor, optional): (B, L, C), the residual stream; None at first.
            rotation (tuple[Tensor, Tensor], optional): From :meth:`rotation`.
            orders (tuple[Tensor | None, ...]): From
                :meth:`~mmvim.models.directions.Directions.orders`.

        Returns:
            tuple[Tensor, Tensor]: Both after these blocks, (B, L, C).
        """
        if rotation is not None:
            hidden = self.rope.rotate(hidden, *rotation)
            if self.rope_residual and residual is not None:
                residual = self.rope.rotate(residual, *rotation)
        blocks = getattr(self, self.blocks_name)[start : start + self.directions.blocks_per_step]
        together = [partial(self._run, block) for block in blocks]
        return self.directions.step(together, hidden, residual, orders)

    def rotation(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines (L, C) for the sequence; class tokens are not rotated."""
        if self.rope is None:
            return None
        tokens = len(self.cls_token_names), self.embed_dims
        cos, sin = self.rope.rotation(grid)  # (M, C)
        place = self.cls_token_place
        return (
            insert_class_tokens(cos[None], cos.new_ones(1, *tokens), place)[0],  # (L, C)
            insert_class_tokens(sin[None], sin.new_zeros(1, *tokens), place)[0],
        )

    def feature(self, hidden: Tensor, residual: Tensor, index: int) -> Tensor:
        """What is returned of a block's output, (B, L, C)."""
        if self.feature_source == 'mixer':
            feature = hidden
        elif index == self.depth - 1:
            feature = residual + self.drop_path(hidden)
        else:
            feature = residual + hidden
        if self.norm_f is not None and index == self.out_indices[-1]:
            feature = self.norm_f(feature.to(self.norm_f.weight.dtype))
        return feature
