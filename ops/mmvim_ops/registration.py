"""What the compiled backends share when they register their operators with torch."""

import torch
from torch import Tensor


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd will want a backward pass of an operator with these arguments."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def like(x: Tensor | None, u: Tensor) -> Tensor:
    """The gradient of an argument; an empty one where it was not given."""
    return u.new_empty(0) if x is None else torch.empty_like(x)


def like_matrix(m: Tensor) -> Tensor:
    """The gradient of B or C: states are the fastest dimension in memory where it varies."""
    if m.ndim == 2:
        return m.new_empty(m.shape)
    return m.new_empty(*m.shape[:-2], m.shape[-1], m.shape[-2]).transpose(-1, -2)


def fake_scan_backward(
    grad_out,
    grad_last_state,
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    checkpoints,
    delta_softplus,
    reverse,
):
    """Gradients of u, delta, A, B, C, D, z, delta_bias, without data."""
    return (
        torch.empty_like(u),
        torch.empty_like(delta),
        A.new_empty(A.shape),
        like_matrix(B),
        like_matrix(C),
        like(D, u),
        like(z, u),
        like(delta_bias, u),
    )


def only_given(arguments, grads) -> tuple[Tensor | None, ...]:
    """None for the gradients of arguments that were not given."""
    return tuple(None if x is None else grad for x, grad in zip(arguments, grads, strict=True))


def save_scan_arguments(ctx, inputs, output):
    """Keep the eight tensors of a scan, and its checkpoints, for the backward pass."""
    *tensors, ctx.delta_softplus, ctx.reverse, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
