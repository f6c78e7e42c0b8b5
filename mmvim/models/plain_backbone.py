"""What backbones share that keep one scale and one sequence of tokens throughout."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from mmengine.model import BaseModule, PretrainedInit
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .arguments import flags, integer, one_of, pair, rate
from .patch_embed import PatchEmbed
from .pretrained import adapt_state_dict, load_pretrained, store_layout
from .sequence import (
    NUM_CLASS_TOKENS,
    insert_class_tokens,
    resize_pos_embed,
    split_class_tokens,
)

__all__ = ['PlainBackbone']


class PlainBackbone(BaseModule):
    """Arguments, tokens, freezing, loading and output shapes of a plain backbone.

    A subclass checks its own arguments, passes the rest on, and writes ``forward``.

    Args:
        arch (dict): What :meth:`parse_arch` returns.
        build_block (Callable): The index of a block and the grid (rows, columns) of ``img_size``
            to the block. Called once for each, in order.
        norm (nn.Module, optional): Final norm.
        Others: As in :class:`~mmvim.models.VisionMamba`.

    Attributes:
        arch_zoo (dict): Named architectures.
        arch_required (tuple[str]): Keys that an ``arch`` dict must have.
        arch_defaults (dict): Keys that it may have.
        cls_token_places (tuple): Values of ``cls_token``.
        blocks_name (str): Attribute that holds the blocks, as official checkpoints name it.
        norm_name (str): Attribute that holds the final norm or None.
        released_cls_token (str): Where the one class token of released weights stands.
        added_parameters (tuple[str]): Parameters that released weights do not have. They must start
            at values that do nothing.

    Raises:
        TypeError, ValueError: For an argument outside of its choices; the message names it.
    """

    arch_zoo: dict[str, dict] = {}
    arch_required: tuple[str, ...] = ('embed_dims', 'depth')
    arch_defaults: dict = {}
    cls_token_places: tuple[str | None, ...] = tuple(NUM_CLASS_TOKENS)
    blocks_name = 'layers'
    norm_name = 'norm_f'
    released_cls_token = 'middle'
    added_parameters: tuple[str, ...] = ()

    def __init__(
        self,
        *,
        arch: dict,
        build_block: Callable[[int, tuple[int, int]], nn.Module],
        norm: nn.Module | None,
        img_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        stride: int | tuple[int, int] | None,
        in_channels: int,
        cls_token: str | None,
        pos_embed: bool,
        drop_rate: float,
        out_type: str,
        out_indices: int | Sequence[int],
        frozen_stages: int,
        with_cp: bool,
        remainder: str | None,
        init_cfg: dict | None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        one_of('cls_token', cls_token, self.cls_token_places)
        one_of('out_type', out_type, ('featmap', 'cls_token', 'avg_featmap', 'raw'))
        one_of('remainder', remainder, ('pad', 'resize', None))
        flags(pos_embed=pos_embed, with_cp=with_cp)
        if out_type == 'cls_token' and cls_token is None:
            raise ValueError("out_type='cls_token' needs a class token, got cls_token=None")
        self.arch, self.embed_dims, self.depth = arch, arch['embed_dims'], arch['depth']
        self.cls_token_place, self.out_type, self.with_cp = cls_token, out_type, with_cp
        self.out_indices = self._parse_out_indices(out_indices)
        self.frozen_stages = integer('frozen_stages', frozen_stages, least=-1)
        if self.frozen_stages > self.depth:
            raise ValueError(
                f'frozen_stages must lie in -1 … depth ({self.depth}), got {frozen_stages}'
            )

        patch = pair('patch_size', patch_size)
        step = patch if stride is None else pair('stride', stride)
        if step[0] > patch[0] or step[1] > patch[1]:
            raise ValueError(f'stride must be in 1 … patch_size ({patch_size}), got {stride}')
        in_channels = integer('in_channels', in_channels)
        self.patch_embed = PatchEmbed(in_channels, self.embed_dims, patch, step)
        self.remainder = remainder
        if remainder == 'resize':
            self.patch_embed.remainder = remainder
        self.grid = self.patch_embed.grid(*pair('img_size', img_size))
        self._init_tokens(pos_embed)
        self.pos_drop = nn.Dropout(rate('drop_rate', drop_rate))
        blocks = nn.ModuleList(build_block(index, self.grid) for index in range(self.depth))
        setattr(self, self.blocks_name, blocks)
        setattr(self, self.norm_name, norm)
        self._freeze()

    @property
    def blocks_run(self) -> list[nn.Module]:
        """The blocks up to the last out index."""
        return list(getattr(self, self.blocks_name)[: self.out_indices[-1] + 1])

    @property
    def traits(self) -> str:
        """The arguments that decide which parameters there are, for messages."""
        return f'cls_token={self.cls_token_place!r}'

    # Arguments --------------------------------------------------------------------------------

    @classmethod
    def parse_arch(cls, arch: str | dict) -> dict:
        """A named architecture or a dict of one, completed and checked."""
        if isinstance(arch, str):
            if arch not in cls.arch_zoo:
                raise ValueError(
                    f'arch must be one of {tuple(cls.arch_zoo)} or a dict, got {arch!r}'
                )
            return {**cls.arch_defaults, **cls.arch_zoo[arch]}
        if not isinstance(arch, dict):
            raise TypeError(f'arch must be one of {tuple(cls.arch_zoo)} or a dict, got {arch!r}')
        missing = set(cls.arch_required) - set(arch)
        unknown = set(arch) - {*cls.arch_required, *cls.arch_defaults}
        if missing or unknown:
            raise ValueError(
                f'an arch dict needs {", ".join(cls.arch_required)} and may have '
                f'{", ".join(cls.arch_defaults)}; '
                f'missing: {sorted(missing)}, unknown: {sorted(unknown, key=str)}'
            )
        for name in set(arch) & {'embed_dims', 'depth'}:
            integer(f"arch['{name}']", arch[name])
        return {**cls.arch_defaults, **arch}

    def _parse_out_indices(self, out_indices: int | Sequence[int]) -> tuple[int, ...]:
        given = out_indices if isinstance(out_indices, list | tuple) else [out_indices]
        given = [integer('out_indices', index, least=-self.depth) for index in given]
        indices = [index + self.depth if index < 0 else index for index in given]
        if not indices or any(index >= self.depth for index in indices):
            raise ValueError(
                f'out_indices must lie in 0 … {self.depth - 1} (depth {self.depth}) '
                f'or count from -1, got {out_indices}'
            )
        if sorted(set(indices)) != indices:
            raise ValueError(f'out_indices must increase, got {out_indices}')
        return tuple(indices)

    # Parameters -------------------------------------------------------------------------------

    def _init_tokens(self, pos_embed: bool) -> None:
        """Create class tokens and position embedding under their official names."""
        names = ['cls_token']
        if self.cls_token_place == 'double':
            names = ['cls_token_head', 'cls_token_tail']
        self.cls_token_names = names[: NUM_CLASS_TOKENS[self.cls_token_place]]
        for name in self.cls_token_names:
            token = nn.Parameter(torch.zeros(1, 1, self.embed_dims))
            setattr(self, name, nn.init.trunc_normal_(token, std=0.02))
        self.pos_embed = None
        if pos_embed:
            length = self.grid[0] * self.grid[1] + len(self.cls_token_names)
            embedding = nn.Parameter(torch.zeros(1, length, self.embed_dims))
            self.pos_embed = nn.init.trunc_normal_(embedding, std=0.02)

    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        return [self.patch_embed, *getattr(self, self.blocks_name)[: self.frozen_stages]]

    def _freeze(self) -> None:
        """Turn off gradients of the frozen stages and of blocks whose output nobody reads.

        The latter would otherwise stop distributed training, which waits for every gradient.
        """
        unused = getattr(self, self.blocks_name)[self.out_indices[-1] + 1 :]
        for module in (*self._frozen_modules(), *unused):
            module.requires_grad_(False)
        if self.frozen_stages >= 0:
            for name in ('pos_embed', *self.cls_token_names):
                if getattr(self, name) is not None:
                    getattr(self, name).requires_grad_(False)

    def train(self, mode: bool = True) -> PlainBackbone:
        """Set the training mode; frozen stages stay in evaluation mode (no drop path)."""
        super().train(mode)
        if mode and self.frozen_stages >= 0:
            for module in (self.pos_drop, *self._frozen_modules()):
                module.eval()
        return self

    def align_to_picture(self) -> None:
        """Called where a segmentor will stretch the maps onto the picture."""
        if self.remainder is None:
            self.patch_embed.remainder = 'resize'

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that stand for places or time scales, as timm's models give them."""
        names = {'pos_embed', *self.cls_token_names}
        for prefix, module in self.named_modules():
            if module is not self and hasattr(module, 'no_weight_decay'):
                names |= {f'{prefix}.{name}' for name in module.no_weight_decay()}
        return names

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Layer of a parameter and number of layers, as mmpretrain's backbones give them.

        Layer 0 are the embeddings, i + 1 is block i, depth + 1 what follows the blocks.
        """
        name, last = param_name.removeprefix(prefix), self.depth + 1
        if not param_name.startswith(prefix):
            return last, last + 1
        if name.startswith(f'{self.blocks_name}.'):
            return int(name.split('.')[1]) + 1, last + 1
        embeddings = ('pos_embed', *self.cls_token_names)
        return (0 if name.startswith('patch_embed.') or name in embeddings else last), last + 1

    def init_weights(self) -> None:
        """Load the checkpoint named by ``init_cfg``; otherwise keep the construction's values."""
        cfgs = self.init_cfg if isinstance(self.init_cfg, list) else [self.init_cfg or {}]
        pretrained = [cfg for cfg in cfgs if cfg.get('type') in ('Pretrained', PretrainedInit)]
        if not pretrained:
            super().init_weights()
            return
        # It sets every parameter, so that other entries of init_cfg would be overwritten.
        load_pretrained(self, **{k: v for k, v in pretrained[-1].items() if k != 'type'})
        self._is_init = True

    def fit_pos_embed(
        self, pos_embed: Tensor, grid: tuple[int, int], cls_token: str | None
    ) -> Tensor:
        """A position embedding of another model, resized to this one's grid and class tokens.

        Args:
            pos_embed (Tensor): (1, L, C).
            grid (tuple[int, int]): Its rows and columns of patches.
            cls_token (str | None): Where its class tokens stand.

        Returns:
            Tensor: (1, L', C). Without rows for class tokens where the other has fewer than this.
        """
        place = self.cls_token_place
        resized = resize_pos_embed(pos_embed, grid, self.grid, cls_token)
        patches, rows = split_class_tokens(resized, cls_token)
        if rows.shape[1] < NUM_CLASS_TOKENS[place]:
            return patches
        return insert_class_tokens(patches, rows, place)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        store_layout(self, destination, prefix)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, metadata: dict, *args) -> None:
        adapt_state_dict(self, state_dict, prefix, metadata)
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)

    # Forward ----------------------------------------------------------------------------------

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        tokens, grid = self.patch_embed(x)  # (B, M, C)
        if self.cls_token_names:
            cls_tokens = torch.cat([getattr(self, name) for name in self.cls_token_names], dim=1)
            cls_tokens = cls_tokens.to(tokens.dtype).expand(tokens.shape[0], -1, -1)  # (B, T, C)
            tokens = insert_class_tokens(tokens, cls_tokens, self.cls_token_place)
        if self.pos_embed is not None:
            place = self.cls_token_place
            tokens = tokens + resize_pos_embed(self.pos_embed, self.grid, grid, place)
        return self.pos_drop(tokens), grid  # (B, L, C), L = M + T

    def _run(self, block: nn.Module, *inputs):
        """The output of a block, which ``with_cp`` computes again in the backward pass."""
        # torch.export cannot read checkpoints. (torch.compiler.is_exporting came with torch 2.7.)
        exporting = getattr(torch.compiler, 'is_exporting', bool)()
        if self.with_cp and torch.is_grad_enabled() and not exporting:
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def _shape(self, sequence: Tensor, grid: tuple[int, int]) -> Tensor:
        """Turn (B, L, C) into what ``out_type`` promises."""
        if self.out_type == 'raw':
            return sequence
        patches, cls_tokens = split_class_tokens(sequence, self.cls_token_place)
        if self.out_type == 'cls_token':
            return cls_tokens.mean(dim=1)  # (B, C)
        if self.out_type == 'avg_featmap':
            return patches.mean(dim=1)  # (B, C)
        # mmcv's RoIAlign reads memory as if it were contiguous, whatever the strides say.
        return patches.transpose(1, 2).contiguous().unflatten(2, grid)  # (B, C, Hp, Wp)


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Rates of ``depth`` blocks that grow linearly from 0 to ``last``."""
    last = rate('drop_path_rate', last)
    return [last * index / max(depth - 1, 1) for index in range(depth)]
