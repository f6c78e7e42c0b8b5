"""FLOPs of anything that torch computes, by :class:`torch.utils.flop_counter.FlopCounterMode`.

Two per multiply-add, nothing for pointwise work. ``mmvim_ops`` has told torch what its scans and
convolutions cost; here torch's own formulas are completed and put right, so that the same model
counts the same on every device and by every kernel:

- fused attention on the CPU, which torch leaves out;
- the backward pass of fused attention without the scores that it computes again, as everywhere
  else: what an implementation computes twice is not the model's (activation checkpointing is
  counted: it runs whole layers again);
- the weight gradient of grouped convolutions, which torch counts as if there were one group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from math import prod

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import mmvim_ops.flops  # noqa: F401  (tells torch of its operators)

__all__ = ['count_flops', 'count_flops_by_module']

aten = torch.ops.aten


def attention(query, key, value, *_, **__) -> int:
    """q kᵀ and its product with v, each (B, heads, L, L) weights."""
    return 2 * prod(query[:3]) * key[2] * (query[3] + value[3])


def attention_backward(grad_out, *arguments, **__) -> int:
    return 2 * attention(*arguments)


def convolution_backward(
    grad_out,
    x,
    weight,
    bias,
    stride,
    padding,
    dilation,
    transposed,
    output_padding,
    groups,
    output_mask,
    **_,
) -> int:
    """As much as forward for each of the two gradients that is wanted, x's and the weight's."""
    positions = prod((x if transposed else grad_out)[2:])
    return 2 * x[0] * positions * prod(weight) * sum(output_mask[:2])


FORMULAS = {
    aten._scaled_dot_product_flash_attention_for_cpu: attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    aten._scaled_dot_product_flash_attention_backward: attention_backward,
    aten._scaled_dot_product_efficient_attention_backward: attention_backward,
    aten._scaled_dot_product_cudnn_attention_backward: attention_backward,
    aten.convolution_backward: convolution_backward,
}


def new_counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=FORMULAS)


def count_flops(function: Callable[[], object]) -> int:
    """FLOPs of what ``function`` computes, backward passes included.

    Works on any device, on ``'meta'`` without computing anything; not for what torch.compile or a
    CUDA graph has made of a model.
    """
    with new_counter() as counter:
        function()
    return counter.get_total_flops()


def count_flops_by_module(model: nn.Module, function: Callable[[], object]) -> dict[str, int]:
    """FLOPs of the forward passes that ``function`` makes, by module.

    Args:
        model (nn.Module): Whose modules are told apart. Their hooks and results are as ever.
        function (Callable): Runs the model or parts of it.

    Returns:
        dict[str, int]: Name of a module, as in ``model.named_modules()``, to the FLOPs while it or
        one inside of it was at work; ``''`` is all that ``function`` did. Modules that were not
        called are missing.
    """
    flops: Counter[str] = Counter()
    with ExitStack() as stack:
        counter = stack.enter_context(new_counter())
        depth: Counter[str] = Counter()
        for name, module in model.named_modules():
            parts = name.split('.')
            scopes = ['.'.join(parts[: i + 1]) for i in range(len(parts))]
            stack.enter_context(_watched(module, scopes if name else [], counter, depth, flops))
        function()
        flops[''] = counter.get_total_flops()
    return dict(flops)


@contextmanager
def _watched(
    module: nn.Module, scopes: list[str], counter: FlopCounterMode, depth: Counter, flops: Counter
) -> Iterator[None]:
    """Add what is counted during calls of ``module.forward`` to all ``scopes``.

    Not by hooks: heads of OpenMMLab call ``forward`` itself, and containers are not called at all.
    """
    forward, replaced = module.forward, 'forward' in vars(module)

    def watched_forward(*args, **kwargs):
        entered = [scope for scope in scopes if not depth[scope]]
        before = counter.get_total_flops()
        depth.update(scopes)
        try:
            return forward(*args, **kwargs)
        finally:
            depth.subtract(scopes)
            flops.update(dict.fromkeys(entered, counter.get_total_flops() - before))

    module.forward = watched_forward
    try:
        yield
    finally:
        del module.forward
        if replaced:
            module.forward = forward
