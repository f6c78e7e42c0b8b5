"""What the operators cost: import this module to count by
:class:`torch.utils.flop_counter.FlopCounterMode`.

Counted as torch counts: two FLOPs per multiply-add of the mathematics, once even where a kernel
saves memory by computing it again, and nothing for pointwise work (softplus, gates, the skip
connection). For every batch element, channel, step and state, a scan multiplies four times,

    Δ A    (Δ u) B    exp(Δ A) h    C h

which is the 3·M·E·N + M·E·N of Zhu et al., "Vision Mamba", arXiv:2401.09417: M steps, E channels
and N states. The backward pass multiplies twice for each of these, as that of a matrix product
does: with g the gradient of y, G that of h_t and X = exp(Δ A) G,

    g h    g C    exp(Δ A) G    X h_{t−1}    G (Δ u)    G B    (X h_{t−1}) A    (X h_{t−1}) Δ

The same call counts the same with every backend, but for two directions of unlike N: 'cuda' pads
the smaller one.
"""

from math import prod

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula, shape_wrapper

from .backends.operators import unflatten  # importing the backends defines the operators

# Formulas take shapes in place of the operators' tensors.


def scan(u, delta, A, *_, **__) -> int:
    return 8 * prod(u) * A[1]


def scan_backward(grad_out, grad_last_state, *arguments, **__) -> int:
    return 2 * scan(*arguments)


def bidirectional_scan(*arguments, **__) -> int:
    *tensors, _, _, _ = arguments
    forward, backward, _ = unflatten(tensors)
    return scan(*forward) + scan(*backward)


def bidirectional_scan_backward(grad_out, *arguments, **__) -> int:
    *tensors, _, _, _, _ = arguments
    forward, backward, _ = unflatten(tensors)
    return 2 * (scan(*forward) + scan(*backward))


def linear(x, weight, *_, **__) -> int:
    return 2 * prod(x) * weight[0]


def conv1d(x, weight, *_, **__) -> int:
    return 2 * prod(x) * weight[1]


def conv1d_backward(grad_out, *arguments, **__) -> int:
    return 2 * conv1d(*arguments)


def mamba_mixer(tokens, norm, in_weight, in_bias, out_weight, out_bias, *arguments, **__) -> int:
    *shapes, _, _, _, _ = arguments
    products = prod(in_weight) + prod(out_weight)  # multiply-adds of a token
    for first in (0, len(shapes) // 2):
        conv_weight, _, x_proj, dt_proj, _, A, _ = shapes[first : first + len(shapes) // 2]
        if conv_weight is not None:
            products += prod(conv_weight) + prod(x_proj) + prod(dt_proj) + 4 * prod(A)
    return 2 * prod(tokens[:2]) * products


def mamba_mixer_backward(grad_out, *arguments, **__) -> int:
    *arguments, _, _ = arguments  # one more than forward has
    return 2 * mamba_mixer(*arguments)


FORMULAS = {
    'scan': scan,
    'scan_backward': scan_backward,
    'scan_segment': scan,
    'bidirectional_scan': bidirectional_scan,
    'bidirectional_scan_backward': bidirectional_scan_backward,
    'linear': linear,
    'conv1d': conv1d,
    'conv1d_backward': conv1d_backward,
    'mamba_mixer': mamba_mixer,
    'mamba_mixer_half': mamba_mixer,
    'mamba_mixer_backward': mamba_mixer_backward,
}
FAMILIES = ('cpp', 'cuda', 'triton', 'torch')


for family in FAMILIES:
    for kind, formula in FORMULAS.items():
        if hasattr(torch.ops.mmvim_ops, f'{family}_{kind}'):
            operator = getattr(torch.ops.mmvim_ops, f'{family}_{kind}')
            register_flop_formula(operator)(formula)
            # torch 2.4 registers the operator's overloads and then looks for the operator.
            flop_registry.setdefault(operator, shape_wrapper(formula))
