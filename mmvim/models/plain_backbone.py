"""What backbones share that keep one scale and one sequence of tokens throughout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmengine.model import BaseModule, PretrainedInit
from torch import Tensor, nn

from .pretrained import adapt_state_dict, load_pretrained
from .sequence import (
    NUM_CLASS_TOKENS,
    insert_class_tokens,
    resize_pos_embed,
    split_class_tokens,
)

__all__ = ['PlainBackbone', 'one_of']


def one_of(name: str, value, choices: Sequence) -> None:
    """Raise a ValueError that names the argument unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f'{name} must be one of {tuple(choices)}, got {value!r}')


class PlainBackbone(BaseModule):
    """Arguments, tokens, freezing, loading and output shapes of a plain backbone.

    A subclass builds ``patch_embed``, calls :meth:`_init_tokens`, builds ``pos_drop``, its blocks
    and its final norm under the names below, calls :meth:`_freeze`, and writes ``forward``.

    Attributes:
        arch_zoo (dict): Named architectures.
        arch_required (tuple[str]): Keys that an ``arch`` dict must have.
        arch_defaults (dict): Keys that it may have.
        blocks_name (str): Attribute that holds the blocks, as official checkpoints name it.
        norm_name (str): Attribute that holds the final norm or None.
        released_cls_token (str): Where the one class token of released weights stands.
        added_parameters (tuple[str]): Parameters that released weights do not have. They must start
            at values that do nothing.
    """

    arch_zoo: dict[str, dict] = {}
    arch_required: tuple[str, ...] = ('embed_dims', 'depth')
    arch_defaults: dict = {}
    blocks_name = 'layers'
    norm_name = 'norm_f'
    released_cls_token = 'middle'
    added_parameters: tuple[str, ...] = ()

    @property
    def traits(self) -> str:
        """The arguments that decide which parameters there are, for messages."""
        return f'cls_token={self.cls_token_place!r}'

    # Arguments --------------------------------------------------------------------------------

    def _parse_arch(self, arch: str | dict) -> dict:
        if isinstance(arch, str):
            if arch not in self.arch_zoo:
                raise ValueError(
                    f'arch must be one of {tuple(self.arch_zoo)} or a dict, got {arch!r}'
                )
            return {**self.arch_defaults, **self.arch_zoo[arch]}
        missing = set(self.arch_required) - set(arch)
        unknown = set(arch) - {*self.arch_required, *self.arch_defaults}
        if missing or unknown:
            raise ValueError(
                f'an arch dict needs {", ".join(self.arch_required)} and may have '
                f'{", ".join(self.arch_defaults)}; '
                f'missing: {sorted(missing)}, unknown: {sorted(unknown)}'
            )
        return {**self.arch_defaults, **arch}

    def _parse_out_indices(self, out_indices: int | Sequence[int]) -> tuple[int, ...]:
        given = [out_indices] if isinstance(out_indices, int) else list(out_indices)
        indices = [index + self.depth if index < 0 else index for index in given]
        if not indices or any(not 0 <= index < self.depth for index in indices):
            raise ValueError(
                f'out_indices must lie in 0 … {self.depth - 1} (depth {self.depth}) '
                f'or count from -1, got {out_indices}'
            )
        if sorted(set(indices)) != indices:
            raise ValueError(f'out_indices must increase, got {out_indices}')
        return tuple(indices)

    def _parse_frozen_stages(self, frozen_stages: int) -> int:
        if not -1 <= frozen_stages <= self.depth:
            raise ValueError(
                f'frozen_stages must lie in -1 … depth ({self.depth}), got {frozen_stages}'
            )
        return frozen_stages

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

    def _class_tokens(self) -> Tensor | None:
        """(1, T, C), or None without class tokens."""
        tokens = [getattr(self, name) for name in self.cls_token_names]
        return torch.cat(tokens, dim=1) if tokens else None

    def _freeze(self) -> None:
        """Turn off gradients of the frozen stages and of blocks whose output nobody reads.

        The latter would otherwise stop distributed training, which waits for every gradient.
        """
        blocks = getattr(self, self.blocks_name)
        frozen = list(blocks[self.out_indices[-1] + 1 :])
        if self.frozen_stages >= 0:
            frozen += [self.patch_embed, *blocks[: self.frozen_stages]]
            for name in ('pos_embed', *self.cls_token_names):
                if getattr(self, name) is not None:
                    getattr(self, name).requires_grad_(False)
        for module in frozen:
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> PlainBackbone:
        """Set the training mode; frozen stages stay in evaluation mode (no drop path)."""
        super().train(mode)
        if mode and self.frozen_stages >= 0:
            self.pos_drop.eval()
            blocks = getattr(self, self.blocks_name)
            for module in (self.patch_embed, *blocks[: self.frozen_stages]):
                module.eval()
        return self

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

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        adapt_state_dict(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    # Forward ----------------------------------------------------------------------------------

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        tokens, grid = self.patch_embed(x)  # (B, M, C)
        cls_tokens = self._class_tokens()
        if cls_tokens is not None:
            cls_tokens = cls_tokens.to(tokens.dtype).expand(len(tokens), -1, -1)  # (B, T, C)
            tokens = insert_class_tokens(tokens, cls_tokens, self.cls_token_place)
        if self.pos_embed is not None:
            place = self.cls_token_place
            tokens = tokens + resize_pos_embed(self.pos_embed, self.grid, grid, place)
        return self.pos_drop(tokens), grid  # (B, L, C), L = M + T

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
