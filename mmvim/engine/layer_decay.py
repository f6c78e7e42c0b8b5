"""Which parameter is decayed, and how fast each layer learns."""

from __future__ import annotations

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

__all__ = ['VimOptimWrapperConstructor']

# Names in backbones that do not say themselves.
BLOCKS = ('layers', 'blocks')
EMBEDDINGS = ('pos_embed', 'cls_token')
UNDECAYED = (*EMBEDDINGS, 'rel_pos_h', 'rel_pos_w')


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class VimOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Parameter groups for Vision Mamba, DeiT and other plain backbones.

    No weight decay on norms, biases and other one-dimensional parameters (D among them), nor on
    what a module's method ``no_weight_decay`` names (timm's convention): A_log, position
    embeddings and class tokens. With ``layer_decay_rate`` r < 1 the learning rate falls
    from the head to the image (`ELECTRA <https://arxiv.org/abs/2003.10555>`_, section 3): what
    comes after the backbone's blocks has the full rate, the last of them r times that, the one
    before r² times, and the embeddings the least. The backbone's method ``get_layer_depth`` gives
    the layers (mmpretrain's convention). A backbone without these methods is read by the names that
    transformers usually have: ``layers`` or ``blocks``, ``patch_embed``, ``pos_embed``.

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
        if rate < 1 and not any(hasattr(backbone, n) for n in ('get_layer_depth', *BLOCKS)):
            raise ValueError(
                'layer_decay_rate < 1 needs a model with backbone.get_layer_depth, '
                'backbone.layers or backbone.blocks'
            )
        undecayed = undecayed_names(module)
        groups: dict[tuple[int, bool], dict] = {}
        for name, param in module.named_parameters():
            if not param.requires_grad:
                continue
            layer, layers = layer_depth(backbone, name)
            decayed = param.ndim > 1 and name not in undecayed
            group = groups.setdefault((layer, decayed), {'params': [], 'param_names': []})
            group['params'].append(param)
            group['param_names'].append(name)
            group['lr'] = self.base_lr * rate ** (layers - 1 - layer)
            group['weight_decay'] = (self.base_wd or 0.0) if decayed else 0.0
        params.extend(groups[key] for key in sorted(groups))
        rates = sorted(group['lr'] for group in params)
        print_log(
            f'{len(params)} parameter groups, learning rates {rates[0]:.3g} … {rates[-1]:.3g}, '
            f'{sum(len(g["params"]) for g in params if not g["weight_decay"])} of '
            f'{sum(len(g["params"]) for g in params)} parameters without weight decay',
            logger='current',
        )


def undecayed_names(model: nn.Module) -> set[str]:
    """Parameters that are not decayed whatever their shape."""
    names = set()
    for prefix, module in model.named_modules():
        if hasattr(module, 'no_weight_decay'):
            names |= {f'{prefix}.{name}' if prefix else name for name in module.no_weight_decay()}
    if not hasattr(getattr(model, 'backbone', None), 'no_weight_decay'):
        every = (name for name, _ in model.named_parameters())
        names |= {name for name in every if name.rsplit('.', 1)[-1] in UNDECAYED}
    return names


def layer_depth(backbone: nn.Module | None, name: str) -> tuple[int, int]:
    """Layer of a parameter of the whole model, and how many layers there are."""
    if hasattr(backbone, 'get_layer_depth'):
        return backbone.get_layer_depth(name, 'backbone.')
    last = max(len(getattr(backbone, blocks, ())) for blocks in BLOCKS) + 1
    if name.startswith(tuple(f'backbone.{blocks}.' for blocks in BLOCKS)):
        return int(name.split('.')[2]) + 1, last + 1
    embedding = name.startswith(tuple(f'backbone.{part}' for part in ('patch_embed', *EMBEDDINGS)))
    return (0 if embedding else last), last + 1
