"""What the compiled backends share when they register their operators with torch."""

import torch
from torch import Tensor

from .torch.scan import refuse_second_derivative


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


def fake_bidirectional_scan_backward(grad_out, *arguments):
    """Gradients of u, delta, A, B, C, D, delta_bias of both directions and of z, without data."""
    grads = []
    for u, delta, A, B, C, D, delta_bias in (arguments[:7], arguments[7:14]):
        grads += [
            torch.empty_like(u),
            torch.empty_like(delta),
            A.new_empty(A.shape),
            like_matrix(B),
            like_matrix(C),
            like(D, u),
            like(delta_bias, u),
        ]
    return [*grads, like(arguments[14], arguments[0])]


def fake_conv1d(x, weight, bias, silu, reverse):
    return torch.empty_like(x)


def fake_conv1d_backward(grad_out, x, weight, bias, silu, reverse):
    return torch.empty_like(x), weight.new_empty(weight.shape), like(bias, x)


def _save_bidirectional_scan(ctx, inputs, output):
    *tensors, ctx.delta_softplus, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _save_conv1d(ctx, inputs, output):
    *tensors, ctx.silu, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def register_gradients(backend: str) -> None:
    """Tell autograd of a backend's operators: ``scan``, ``bidirectional_scan`` and ``conv1d``, each
    with a ``_backward``, which has no derivatives itself."""

    def operator(name: str):
        return getattr(torch.ops.mmvim_ops, f'{backend}_{name}_backward')

    # Each reads saved_tensors once: recomputation hands them out a single time.

    def scan(ctx, grad_out, grad_last_state, _):
        saved = ctx.saved_tensors
        grads = operator('scan')(grad_out, grad_last_state, *saved, ctx.delta_softplus, ctx.reverse)
        return *only_given(saved[:8], grads), None, None, None

    def bidirectional_scan(ctx, grad_out, *_):
        saved = ctx.saved_tensors
        grads = operator('bidirectional_scan')(grad_out, *saved, ctx.delta_softplus, ctx.scale)
        return *only_given(saved[:15], grads), None, None, None

    def conv1d(ctx, grad_out):
        saved = ctx.saved_tensors
        grads = operator('conv1d')(grad_out, *saved, ctx.silu, ctx.reverse)
        return *only_given(saved, grads), None, None

    for backward, save in (
        (scan, save_scan_arguments),
        (bidirectional_scan, _save_bidirectional_scan),
        (conv1d, _save_conv1d),
    ):
        name = f'mmvim_ops::{backend}_{backward.__name__}'
        torch.library.register_autograd(name, backward, setup_context=save)
        torch.library.register_autograd(f'{name}_backward', refuse_second_derivative)
