"""DeiT: the plain vision transformer, the baseline that Vim is compared with.

Read from top to bottom: feed-forward network, block, backbone. Attention and its windows are in
``attention.py``, what the backbone shares with VisionMamba in ``plain_backbone.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmcv.cnn.bricks import DropPath
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import Attention, join_windows, split_windows
from .linear import Linear
from .patch_embed import PatchEmbed
from .plain_backbone import PlainBackbone, one_of

__all__ = ['DeiT', 'DeiTBlock']


class Mlp(nn.Module):
    """Linear, GELU, linear, on every token by itself."""

    def __init__(self, embed_dims: int, hidden_dims: int) -> None:
        super().__init__()
        self.fc1 = Linear(embed_dims, hidden_dims)
        self.act = nn.GELU()
        self.fc2 = Linear(hidden_dims, embed_dims)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(tokens)))


class DeiTBlock(nn.Module):
    """Pre-norm attention and feed-forward network, each added to the tokens.

    Args:
        attn (Attention): Mixes the tokens.
        embed_dims (int): Channels C of the tokens.
        mlp_ratio (float): The feed-forward network has mlp_ratio * C hidden channels.
        drop_path (float): Probability of leaving out each of the two for a whole sample.
        window_size (int, optional): Attend in windows of this many patches; to all if None.
    """

    def __init__(
        self,
        attn: Attention,
        embed_dims: int,
        mlp_ratio: float = 4,
        drop_path: float = 0.0,
        window_size: int | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dims, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(embed_dims, eps=1e-6)
        self.mlp = Mlp(embed_dims, int(mlp_ratio * embed_dims))
        self.drop_path = DropPath(drop_path)
        self.window_size = window_size

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, L, C) tokens of a (Hp, Wp) grid to the same shape."""
        tokens = tokens + self.drop_path(self._attend(self.norm1(tokens), grid))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))

    def _attend(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.window_size is None:
            return self.attn(tokens, grid)
        windows, bias = split_windows(tokens, grid, self.window_size)  # (B * n, w², C)
        windows = self.attn(windows, (self.window_size, self.window_size), bias)
        return join_windows(windows, grid, self.window_size)  # (B, L, C)


@MODELS.register_module()
class DeiT(PlainBackbone):
    """DeiT backbone (`paper <https://arxiv.org/abs/2012.12877>`_), with windows if wanted.

    The arguments are those of :class:`~mmvim.models.VisionMamba` wherever they mean the same, so
    that a config is changed from one to the other in a line. Any input size works, too. Parameters
    carry the names of the official checkpoints.

    Args:
        arch (str | dict): ``'tiny'``, ``'small'``, ``'base'``, or a dict with ``embed_dims``,
            ``depth`` and ``num_heads`` and optionally ``mlp_ratio`` (4).
        img_size (int | tuple[int, int]): Size (H, W) whose grid the position embedding is stored
            for.
        patch_size (int): Side of a patch in pixels.
        in_channels (int): Channels of the input image.
        cls_token (str, optional): ``'head'`` or None. Windows and relative positions know patches
            only: None with them.
        pos_embed (bool): Add a learned absolute position embedding.
        attention (str): ``'fused'``: torch's scaled_dot_product_attention. ``'explicit'``: the
            (L, L) attention weights are computed and stored, as in the paper's comparison of
            memory.
        window_size (int, optional): Attend in windows of this many patches a side (`ViTDet
            <https://arxiv.org/abs/2203.16527>`_: 14), except in the blocks of ``global_indices``.
            Where windows stick out of the grid, the filling is not attended to.
        global_indices (Sequence[int], optional): Blocks, counted from 0, that attend to the whole
            image in spite of ``window_size``. Default: four, evenly spread, the last one included.
        rel_pos (bool): Decomposed relative positions in every block, which start at zero. Global
            blocks then store (L, L) biases.
        qkv_bias (bool): Whether queries, keys and values have a bias.
        drop_rate (float): Dropout after the position embedding.
        drop_path_rate (float): Stochastic depth, growing linearly to this rate at the last block.
        out_type (str): ``'featmap'``: (B, C, Hp, Wp) without class token; ``'cls_token'``: (B, C);
            ``'avg_featmap'``: (B, C), the mean over patches; ``'raw'``: (B, L, C), the sequence.
        out_indices (int | Sequence[int]): Blocks, counted from 0 (or from -1 backward), whose
            output is returned. Blocks after the last of them are neither run nor trained.
        final_norm (bool): Normalise the output at the last out index.
        frozen_stages (int): -1 freezes nothing, 0 the embeddings, n > 0 the first n blocks as well.
        with_cp (bool): Recompute each block in the backward pass instead of storing what is
            inside it.
        init_cfg (dict, optional): ``dict(type='Pretrained', checkpoint=FILE)`` takes files of this
            project and official ``.pth`` files alike; see :mod:`mmvim.models.pretrained`.

    Raises:
        ValueError: For an argument outside of the choices above; the message names it.
    """

    arch_zoo = {
        'tiny': dict(embed_dims=192, depth=12, num_heads=3),
        'small': dict(embed_dims=384, depth=12, num_heads=6),
        'base': dict(embed_dims=768, depth=12, num_heads=12),
    }
    arch_required = ('embed_dims', 'depth', 'num_heads')
    arch_defaults = dict(mlp_ratio=4)
    blocks_name = 'blocks'
    norm_name = 'norm'
    released_cls_token = 'head'
    added_parameters = ('rel_pos_h', 'rel_pos_w')

    def __init__(
        self,
        arch: str | dict = 'tiny',
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        cls_token: str | None = 'head',
        pos_embed: bool = True,
        attention: str = 'fused',
        window_size: int | None = None,
        global_indices: Sequence[int] | None = None,
        rel_pos: bool = False,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_type: str = 'featmap',
        out_indices: int | Sequence[int] = -1,
        final_norm: bool = True,
        frozen_stages: int = -1,
        with_cp: bool = False,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        one_of('cls_token', cls_token, ('head', None))
        one_of('attention', attention, ('fused', 'explicit'))
        one_of('out_type', out_type, ('featmap', 'cls_token', 'avg_featmap', 'raw'))
        if out_type == 'cls_token' and cls_token is None:
            raise ValueError("out_type='cls_token' needs a class token, got cls_token=None")
        if cls_token is not None and (window_size is not None or rel_pos):
            raise ValueError(
                'window_size and rel_pos know patches only: they need cls_token=None, '
                f'got {cls_token!r}'
            )
        self.arch = arch = self._parse_arch(arch)
        self.embed_dims, self.depth = arch['embed_dims'], arch['depth']
        if self.embed_dims % arch['num_heads']:
            raise ValueError(
                f'embed_dims ({self.embed_dims}) must be a multiple of '
                f'num_heads ({arch["num_heads"]})'
            )
        windows = self._parse_windows(window_size, global_indices)
        self.cls_token_place, self.out_type = cls_token, out_type
        self.out_indices = self._parse_out_indices(out_indices)
        self.frozen_stages, self.with_cp = self._parse_frozen_stages(frozen_stages), with_cp
        img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)

        self.patch_embed = PatchEmbed(in_channels, self.embed_dims, patch_size, patch_size)
        self.grid = self.patch_embed.grid(*img_size)
        self._init_tokens(pos_embed)
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList()
        rates = torch.linspace(0, drop_path_rate, self.depth).tolist()
        for window, rate in zip(windows, rates, strict=True):
            rel_pos_size = (self.grid if window is None else (window, window)) if rel_pos else None
            attn = Attention(
                self.embed_dims, arch['num_heads'], qkv_bias, attention, rel_pos_size=rel_pos_size
            )
            self.blocks.append(DeiTBlock(attn, self.embed_dims, arch['mlp_ratio'], rate, window))
        self.norm = nn.LayerNorm(self.embed_dims, eps=1e-6) if final_norm else None
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self._freeze()

    def _parse_windows(
        self, window_size: int | None, global_indices: Sequence[int] | None
    ) -> list[int | None]:
        """The window of each block; None where attention is global."""
        if window_size is None:
            if global_indices is not None:
                raise ValueError(
                    f'global_indices needs window_size: without windows all blocks are global, '
                    f'got {global_indices}'
                )
            return [None] * self.depth
        if window_size < 1:
            raise ValueError(f'window_size must be positive, got {window_size}')
        if global_indices is None:
            global_indices = [self.depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]
        elif any(not 0 <= index < self.depth for index in global_indices):
            raise ValueError(
                f'global_indices must lie in 0 … {self.depth - 1}, got {global_indices}'
            )
        return [None if i in global_indices else window_size for i in range(self.depth)]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Features of (B, in_channels, H, W) images, one tensor per out index.

        Their shapes follow ``out_type``; (Hp, Wp) is the grid of patches, padding included.
        """
        tokens, grid = self._embed(x)  # (B, L, C), (Hp, Wp)
        features = []
        for index, block in enumerate(self.blocks[: self.out_indices[-1] + 1]):
            if self.with_cp and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, grid, use_reentrant=False)
            else:
                tokens = block(tokens, grid)
            if index in self.out_indices:
                last = index == self.out_indices[-1]
                feature = self.norm(tokens) if last and self.norm is not None else tokens
                features.append(self._shape(feature, grid))
        return tuple(features)
