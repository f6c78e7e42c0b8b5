"""Which parameter is decayed, and how fast each layer learns."""

from __future__ import annotations

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

__all__ = ['VimOptimWrapperConstructor']

# Two-dimensional parameters that stand for time scales or places, not for linear maps.
UNDECAYED = (
    *('A_log', 'A_b_log', 'pos_embed', 'rel_pos_h', 'rel_pos_w'),
    *('cls_token', 'cls_token_head', 'cls_token_tail'),
)
BLOCKS = ('layers', 'blocks')  # what backbones call them


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class VimOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Parameter groups for Vision Mamba, DeiT and other backbones with ``layers`` or ``blocks``.

    No weight decay on norms, biases and other one-dimensional parameters (D among them), A_log,
    position embeddings and class tokens. With ``layer_decay_rate`` r < 1 the learning rate falls
    from the head to the image (`ELECTRA <https://arxiv.org/abs/2003.10555>`_, section 3): what
    comes after the backbone's blocks has the full rate, the last of them r times that, the one
    before r² times, and the embeddings the least.

    Use it as ``optim_wrapper=dict(constructor='VimOptimWrapperConstructor',
    paramwise_cfg=dict(layer_decay_rate=0.92), ...)``.

    Raises:
        ValueError: For other keys in ``paramwise_cfg`` or a rate outside of (0, 1].
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        paramwise_cfg = {'layer_decay_rate': 1.0, **(paramwise_cfg or {})}
        unknown = set(paramwise_cfg) - {'layer_decay_rate'}
        if unknown:
            raise ValueError(
                'paramwise_cfg of VimOptimWrapperConstructor takes layer_decay_rate only, '
                f'got also {sorted(unknown)}'
            )
        rate = paramwise_cfg['layer_decay_rate']
        if not 0 < rate <= 1:
            raise ValueError(f'layer_decay_rate must lie in (0, 1], got {rate}')
        super().__init__(optim_wrapper_cfg, paramwise_cfg)

    def add_params(self, params: list[dict], module: nn.Module, **kwargs) -> None:
        """Append the parameter groups of the whole model ``module`` to ``params``."""
        rate = self.paramwise_cfg['layer_decay_rate']
        backbone = getattr(module, 'backbone', None)
        depth = max(len(getattr(backbone, name, ())) for name in BLOCKS)
        if rate < 1 and depth == 0:
            raise ValueError(
                'layer_decay_rate < 1 needs a model with backbone.layers or backbone.blocks'
            )
        groups: dict[tuple[int, bool], dict] = {}
        for name, param in module.named_parameters():
            if not param.requires_grad:
                continue
            layer, decayed = layer_index(name, depth), is_decayed(name, param.ndim)
            group = groups.setdefault((layer, decayed), {'params': [], 'param_names': []})
            group['params'].append(param)
            group['param_names'].append(name)
            group['lr'] = self.base_lr * rate ** (depth + 1 - layer)
            group['weight_decay'] = (self.base_wd or 0.0) if decayed else 0.0
        params.extend(groups[key] for key in sorted(groups))
        rates = sorted(group['lr'] for group in params)
        print_log(
            f'{len(params)} parameter groups, learning rates {rates[0]:.3g} … {rates[-1]:.3g}, '
            f'{sum(len(g["params"]) for g in params if not g["weight_decay"])} of '
            f'{sum(len(g["params"]) for g in params)} parameters without weight decay',
            logger='current',
        )


def layer_index(name: str, depth: int) -> int:
    """0 for what comes before the backbone's blocks, i + 1 for block i, depth + 1 after them."""
    if name.startswith(tuple(f'backbone.{blocks}.' for blocks in BLOCKS)):
        return int(name.split('.')[2]) + 1
    embeddings = ('patch_embed', 'pos_embed', 'cls_token')
    if name.startswith(tuple(f'backbone.{embedding}' for embedding in embeddings)):
        return 0
    return depth + 1


def is_decayed(name: str, ndim: int) -> bool:
    return ndim > 1 and name.rsplit('.', 1)[-1] not in UNDECAYED
