"""DeiT: the plain vision transformer, the baseline that Vim is compared with.

Read from top to bottom: feed-forward network, block, backbone. Attention and its windows are in
``attention.py``, what the backbone shares with VisionMamba in ``plain_backbone.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmcv.cnn.bricks import DropPath
from mmengine.registry import MODELS
from torch import Tensor, nn

from .arguments import flags, integer, number, one_of
from .attention import Attention, join_windows, split_windows
from .linear import Linear
from .plain_backbone import PlainBackbone, drop_path_rates

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
        arch (str | dict): ``'tiny'``, ``'small'``, ``'base'`` are DeiT's; ``'nano'`` (about a
            million parameters, as Vim's) is this project's own, for trainings on a CPU. Or a dict
            with ``embed_dims``, ``depth`` and ``num_heads`` and optionally ``mlp_ratio`` (4).
        img_size (int | tuple[int, int]): Size (H, W) whose grid the position embedding is stored
            for.
        patch_size (int | tuple[int, int]): Sides of a patch in pixels.
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
        stride (int | tuple[int, int], optional): Steps between patches in pixels; ``patch_size`` if
            not given.
        remainder (str, optional): What happens to sides that the patches do not cover exactly, as
            in :class:`~mmvim.models.VisionMamba`.
        init_cfg (dict, optional): ``dict(type='Pretrained', checkpoint=FILE)`` takes files of this
            project and official ``.pth`` files alike; see :mod:`mmvim.models.pretrained`.

    Raises:
        TypeError, ValueError: For an argument outside of the choices above; the message names it.
    """

    arch_zoo = {
        'nano': dict(embed_dims=96, depth=9, num_heads=3),
        'tiny': dict(embed_dims=192, depth=12, num_heads=3),
        'small': dict(embed_dims=384, depth=12, num_heads=6),
        'base': dict(embed_dims=768, depth=12, num_heads=12),
    }
    arch_required = ('embed_dims', 'depth', 'num_heads')
    arch_defaults = dict(mlp_ratio=4)
    blocks_name = 'blocks'
    cls_token_places = ('head', None)
    norm_name = 'norm'
    released_cls_token = 'head'
    added_parameters = ('rel_pos_h', 'rel_pos_w')

    def __init__(
        self,
        arch: str | dict = 'tiny',
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
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
        stride: int | tuple[int, int] | None = None,
        remainder: str | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        arch = self.parse_arch(arch)
        dims, heads = arch['embed_dims'], integer("arch['num_heads']", arch['num_heads'])
        number("arch['mlp_ratio']", arch['mlp_ratio'])
        if dims % heads:
            raise ValueError(f'embed_dims ({dims}) must be a multiple of num_heads ({heads})')
        one_of('attention', attention, ('fused', 'explicit'))
        flags(rel_pos=rel_pos, qkv_bias=qkv_bias, final_norm=final_norm)
        if cls_token is not None and (window_size is not None or rel_pos):
            raise ValueError(
                'window_size and rel_pos know patches only: they need cls_token=None, '
                f'got {cls_token!r}'
            )
        windows = parse_windows(arch['depth'], window_size, global_indices)
        rates = drop_path_rates(drop_path_rate, arch['depth'])

        def build_block(index: int, grid: tuple[int, int]) -> DeiTBlock:
            window = windows[index]
            rel_pos_size = (grid if window is None else (window, window)) if rel_pos else None
            attn = Attention(dims, heads, qkv_bias, attention, rel_pos_size=rel_pos_size)
            return DeiTBlock(attn, dims, arch['mlp_ratio'], rates[index], window)

        super().__init__(
            arch=arch,
            build_block=build_block,
            norm=nn.LayerNorm(dims, eps=1e-6) if final_norm else None,
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
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Features of (B, in_channels, H, W) images, one tensor per out index.

        Their shapes follow ``out_type``; (Hp, Wp) is the grid of patches, padding included.
        """
        tokens, grid = self._embed(x)  # (B, L, C), (Hp, Wp)
        features = []
        for index, block in enumerate(self.blocks_run):
            tokens = self._run(block, tokens, grid)
            if index in self.out_indices:
                last = index == self.out_indices[-1]
                feature = self.norm(tokens) if last and self.norm is not None else tokens
                features.append(self._shape(feature, grid))
        return tuple(features)


def parse_windows(
    depth: int, window_size: int | None, global_indices: Sequence[int] | None
) -> list[int | None]:
    """The window of each block; None where attention is global."""
    if window_size is None:
        if global_indices is not None:
            raise ValueError(
                f'global_indices needs window_size: without windows all blocks are global, '
                f'got {global_indices}'
            )
        return [None] * depth
    window_size = integer('window_size', window_size)
    if global_indices is None:
        global_indices = [depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]
    elif any(not 0 <= integer('global_indices', i, least=0) < depth for i in global_indices):
        raise ValueError(f'global_indices must lie in 0 … {depth - 1}, got {global_indices}')
    return [None if i in global_indices else window_size for i in range(depth)]
