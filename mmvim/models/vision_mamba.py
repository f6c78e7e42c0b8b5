"""Vision Mamba (Vim): a pure state-space backbone for images.

Read from top to bottom: block, backbone. The token mixer inside a block is in ``mamba_mixer.py``;
what the backbone shares with other plain ones (arguments, tokens, loading) in
``plain_backbone.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmcv.cnn.bricks import DropPath
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .blockwise import Workspace, run_blockwise
from .mamba_mixer import MambaMixer
from .patch_embed import PatchEmbed
from .plain_backbone import PlainBackbone, one_of
from .rotary import RotaryEmbedding2D
from .sequence import NUM_CLASS_TOKENS, insert_class_tokens

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
        self, hidden: Tensor, residual: Tensor | None, workspace: Workspace | None = None
    ) -> tuple[Tensor, Tensor]:
        """Previous mixer output and residual stream, both (B, L, C), to those after this block.

        With a workspace both are changed in place, see :mod:`mmvim.models.blockwise`.
        """
        if workspace is not None:
            return run_blockwise(self.mixer, self.norm, hidden, residual, workspace)
        if residual is None:
            residual = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        else:
            residual = residual + self.drop_path(hidden)
        normed = self.norm(residual.to(self.norm.weight.dtype))
        return self.mixer(normed), residual


@MODELS.register_module()
class VisionMamba(PlainBackbone):
    """Vision Mamba backbone (`paper <https://arxiv.org/abs/2401.09417>`_).

    An image becomes a row-major sequence of patches, class tokens and a learned position
    embedding are added, and blocks of bidirectional selective scans mix the sequence at a cost
    linear in its length. Any input size works: the position embedding is resized to the input's
    grid, and sides that the patches do not cover exactly are zero-padded at the right and bottom.

    Args:
        arch (str | dict): ``'tiny'``, ``'small'``, ``'base'``, or a dict with ``embed_dims`` and
            ``depth`` and optionally ``d_state`` (16), ``d_conv`` (4), ``expand`` (2).
        img_size (int | tuple[int, int]): Size (H, W) whose grid the position embedding is stored
            for.
        patch_size (int): Side of a patch in pixels.
        stride (int, optional): Step between patches in pixels; ``patch_size`` if not given.
        in_channels (int): Channels of the input image.
        directions (str): How the sequence is scanned. ``'ssm_conv'`` (default) gives every block a
            backward convolution and scan of its own; ``'ssm'`` a backward scan that shares all but
            A; ``'block'`` pairs the blocks, the second of each pair reading backward;
            ``'sequence'`` scans forward only but flips the sequence at random in training;
            ``'none'`` scans forward only.
        reduction (str): ``'mean'`` or ``'sum'`` of the two directions of ``'ssm_conv'``. All
            released weights use the mean; the sum tends to overflow under mixed precision.
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
        init_cfg (dict, optional): ``dict(type='Pretrained', checkpoint=FILE)`` takes files of this
            project and official ``.pth`` files alike; see :mod:`mmvim.models.pretrained`.

    Raises:
        ValueError: For an argument outside of the choices above; the message names it.
    """

    arch_zoo = {
        'tiny': dict(embed_dims=192, depth=24),
        'small': dict(embed_dims=384, depth=24),
        'base': dict(embed_dims=768, depth=24),
    }
    arch_defaults = dict(d_state=16, d_conv=4, expand=2)

    def __init__(
        self,
        arch: str | dict = 'tiny',
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int | None = None,
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
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        one_of('directions', directions, ('ssm_conv', 'ssm', 'block', 'sequence', 'none'))
        one_of('reduction', reduction, ('mean', 'sum'))
        one_of('cls_token', cls_token, tuple(NUM_CLASS_TOKENS))
        one_of('norm', norm, ('rms', 'layer'))
        one_of('out_type', out_type, ('featmap', 'cls_token', 'avg_featmap', 'raw'))
        one_of('feature_source', feature_source, ('residual', 'mixer'))
        if out_type == 'cls_token' and cls_token is None:
            raise ValueError("out_type='cls_token' needs a class token, got cls_token=None")
        if rope_residual and not rope:
            raise ValueError('rope_residual=True needs rope=True')
        self.arch = arch = self._parse_arch(arch)
        self.embed_dims, self.depth = arch['embed_dims'], arch['depth']
        if directions == 'block' and self.depth % 2:
            raise ValueError(f"directions='block' pairs blocks: depth is odd ({self.depth})")
        self.directions, self.cls_token_place = directions, cls_token
        self.out_type, self.feature_source = out_type, feature_source
        self.out_indices = self._parse_out_indices(out_indices)
        self.frozen_stages, self.with_cp = self._parse_frozen_stages(frozen_stages), with_cp
        img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)

        stride = patch_size if stride is None else stride
        if not 0 < stride <= patch_size:
            raise ValueError(f'stride must be in 1 … patch_size ({patch_size}), got {stride}')
        self.patch_embed = PatchEmbed(in_channels, self.embed_dims, patch_size, stride)
        self.grid = self.patch_embed.grid(*img_size)
        self._init_tokens(pos_embed)
        self.pos_drop = nn.Dropout(drop_rate)
        self.rope, self.rope_residual = None, rope_residual
        if rope:
            self.rope = RotaryEmbedding2D(self.embed_dims, rope_grid or img_size[0] // patch_size)

        # A block drops the output of the one before it, so the rates are shifted by one.
        rates = [0.0, *torch.linspace(0, drop_path_rate, self.depth).tolist()]
        mixer_cfg = dict(
            embed_dims=self.embed_dims,
            depth=self.depth,
            directions=directions if directions in ('ssm_conv', 'ssm') else 'none',
            reduction=reduction,
            layer_scale=layer_scale,
            **{key: arch[key] for key in self.arch_defaults},
        )
        self.layers = nn.ModuleList(
            VimBlock(MambaMixer(**mixer_cfg), build_norm(norm, self.embed_dims), rate)
            for rate in rates[:-1]
        )
        self.drop_path = DropPath(rates[-1])
        self.norm_f = None
        if final_norm and not (feature_source == 'mixer' and out_type == 'featmap'):
            self.norm_f = build_norm(norm, self.embed_dims)
        self._freeze()

    @property
    def traits(self) -> str:
        return f'directions={self.directions!r}, {super().traits}'

    def _parse_out_indices(self, out_indices: int | Sequence[int]) -> tuple[int, ...]:
        indices = super()._parse_out_indices(out_indices)
        if self.directions == 'block' and any(index % 2 == 0 for index in indices):
            raise ValueError(
                f"with directions='block' out_indices must end a pair (be odd), got {out_indices}"
            )
        return indices

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Features of (B, in_channels, H, W) images, one tensor per out index.

        Their shapes follow ``out_type``; (Hp, Wp) is the grid of patches, padding included.
        """
        hidden, grid = self._embed(x)  # (B, L, C), (Hp, Wp)
        rotation = self._rotation(grid)
        flipped = self.directions == 'sequence' and self.training and bool(torch.rand(()) < 0.5)
        if flipped:
            hidden = hidden.flip(1)
            rotation = None if rotation is None else tuple(table.flip(0) for table in rotation)

        features = []
        residual = None
        workspace = self._workspace(hidden)
        if workspace is not None:
            hidden = hidden.contiguous()
        step = 2 if self.directions == 'block' else 1
        for index in range(step - 1, self.out_indices[-1] + 1, step):
            if rotation is not None:
                hidden = self.rope.rotate(hidden, *rotation)
                if self.rope_residual and residual is not None:
                    residual = self.rope.rotate(residual, *rotation)
            if self.directions == 'block':
                hidden, residual = self._run_pair(index - 1, hidden, residual)
            elif workspace is not None:
                hidden, residual = self.layers[index](hidden, residual, workspace)
            else:
                hidden, residual = self._run_block(index, hidden, residual)
            if index in self.out_indices:
                feature = self._feature(hidden, residual, index)
                features.append(self._shape(feature.flip(1) if flipped else feature, grid))
        return tuple(features)

    def _rotation(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines (L, C) for the sequence; class tokens are not rotated."""
        if self.rope is None:
            return None
        still = len(self.cls_token_names), self.embed_dims
        cos, sin = self.rope.rotation(grid)  # (M, C)
        place = self.cls_token_place
        return (
            insert_class_tokens(cos[None], cos.new_ones(1, *still), place)[0],  # (L, C)
            insert_class_tokens(sin[None], sin.new_zeros(1, *still), place)[0],
        )

    def _workspace(self, hidden: Tensor) -> Workspace | None:
        """Memory for inference a stretch of tokens at a time; None where that is not done.

        Only the CPU gains from it: fresh memory costs as much there as what is computed in it.
        """
        possible = (
            hidden.device.type == 'cpu'
            and hidden.dtype in (torch.float32, torch.float64)
            and self.directions != 'block'
            and not self.training
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled('cpu')
            and not torch.compiler.is_compiling()
            # Hooks on a mixer want it to be called.
            and not any(block.mixer._forward_hooks for block in self.layers)
            and not any(block.mixer._forward_pre_hooks for block in self.layers)
        )
        return Workspace(hidden, self.layers[0].mixer.inner_dims) if possible else None

    def _run_block(self, index: int, hidden: Tensor, residual: Tensor | None):
        block = self.layers[index]
        if self.with_cp and torch.is_grad_enabled():
            return checkpoint(block, hidden, residual, use_reentrant=False)
        return block(hidden, residual)

    def _run_pair(self, index: int, hidden: Tensor, residual: Tensor | None):
        """Run block ``index`` forward and the next one on the flipped sequence, and add up."""
        forward = self._run_block(index, hidden, residual)
        flipped = None if residual is None else residual.flip(1)
        backward = self._run_block(index + 1, hidden.flip(1), flipped)
        return tuple(ahead + back.flip(1) for ahead, back in zip(forward, backward, strict=True))

    def _feature(self, hidden: Tensor, residual: Tensor, index: int) -> Tensor:
        """What is returned of a block's output, (B, L, C)."""
        if self.feature_source == 'mixer':
            feature = hidden.clone()  # the next block may write there
        elif index == self.depth - 1:
            feature = residual + self.drop_path(hidden)
        else:
            feature = residual + hidden
        if self.norm_f is not None and index == self.out_indices[-1]:
            feature = self.norm_f(feature.to(self.norm_f.weight.dtype))
        return feature
