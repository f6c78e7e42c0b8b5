"""The operators of the backends that have kernels: defined, traced and differentiated alike.

Their names are ``mmvim_ops::<family>_<operation>``, their schemas those of ``schemas.py``. A family
is what one backend has.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..calls import BidirectionalCall, Conv1dCall, Direction, ScanCall, SegmentCall
from ..checks import in_transform
from ..naive import compute_dtype
from .schemas import SCHEMAS


class ScanTensors(NamedTuple):
    """The tensors of operators ``scan`` and ``scan_segment``, in the order of their schema."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None

    def direction(self) -> Direction:
        return Direction(
            self.u, self.delta, self.A, self.B, self.C, self.D, delta_bias=self.delta_bias
        )


def scan_tensors(direction: Direction, z: Tensor | None) -> ScanTensors:
    return ScanTensors(*direction[:6], z, direction.delta_bias)


def unflatten(tensors) -> tuple[Direction, Direction, Tensor | None]:
    """Both directions and z from the tensors of operator ``bidirectional_scan``."""
    *directions, z = tensors
    fields = len(Direction._fields)
    return Direction(*directions[:fields]), Direction(*directions[fields:]), z


LIBRARY = torch.library.Library('mmvim_ops', 'FRAGMENT')  # what is registered lives as long as it


def operator(family: str, name: str):
    return getattr(torch.ops.mmvim_ops, f'{family}_{name}')


# How backends call their operators.


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd will want a backward pass of an operator with these arguments."""
    if torch.jit.is_tracing():
        return True  # what is traced may run in either mode, and torch compares both
    if not torch.is_grad_enabled():
        return False
    # What torch.func.vmap has wrapped does not say whether a gradient is wanted of it outside.
    return in_transform() or any(x is not None and x.requires_grad for x in tensors)


def scan(family: str, call: ScanCall) -> tuple[Tensor, Tensor]:
    tensors = scan_tensors(call.direction, call.z)
    out, last_state, _ = operator(family, 'scan')(
        *tensors, call.delta_softplus, call.reverse, needs_gradient(*tensors)
    )
    return out, last_state


def bidirectional_scan(family: str, call: BidirectionalCall) -> Tensor:
    tensors = (*call.forward, *call.backward, call.z)
    return operator(family, 'bidirectional_scan')(
        *tensors, call.delta_softplus, call.scale, needs_gradient(*tensors)
    )[0]


def scan_segment_(family: str, call: SegmentCall) -> None:
    out = call.out.to(call.state.dtype)  # half precision is computed in float32
    operator(family, 'scan_segment')(
        *scan_tensors(call.direction, call.z),
        *(call.state, out, call.delta_softplus, call.reverse, call.accumulate, call.scale),
    )
    if out is not call.out:
        call.out.copy_(out)


def conv1d(family: str, call: Conv1dCall) -> Tensor:
    return operator(family, 'conv1d')(*call)


def taps_limit(call: Conv1dCall, most: int) -> str | None:
    """Why a convolution has too many taps for a kernel; None where it has not."""
    taps = call.weight.shape[1]
    return f'takes at most {most} taps, but weight has {taps}' if taps > most else None


# Results without data, for tracing: shapes, dtypes and strides.


def like(x: Tensor | None, u: Tensor) -> Tensor:
    """The gradient of an argument; an empty one where it was not given."""
    return u.new_empty(0) if x is None else torch.empty_like(x)


def like_matrix(m: Tensor) -> Tensor:
    """The gradient of B or C: states are the fastest dimension in memory where it varies."""
    if m.ndim == 2:
        return torch.empty_like(m, memory_format=torch.contiguous_format)
    return m.new_empty(*m.shape[:-2], m.shape[-1], m.shape[-2]).transpose(-1, -2)


def fake_checkpoints(saved_states: Callable, u: Tensor, A: Tensor, save: bool) -> Tensor:
    batch, channels, length = u.shape
    shape = (batch, saved_states(length), A.shape[1], channels) if save else (0,)
    return u.new_empty(shape, dtype=compute_dtype(u.dtype))


def fake_scan(saved_states: Callable, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    u, _, A, *_, save = arguments
    last_state = u.new_empty(u.shape[0], u.shape[1], A.shape[1], dtype=compute_dtype(u.dtype))
    return torch.empty_like(u), last_state, fake_checkpoints(saved_states, u, A, save)


def _fake_gradients(direction: Direction) -> Direction:
    u, delta, A, B, C, D, delta_bias = direction
    return Direction(
        torch.empty_like(u),
        torch.empty_like(delta),
        torch.empty_like(A, memory_format=torch.contiguous_format),
        like_matrix(B),
        like_matrix(C),
        like(D, u),
        like(delta_bias, u),
    )


def fake_scan_backward(grad_out, grad_last_state, *arguments) -> tuple[Tensor, ...]:
    *tensors, _, _, _ = arguments
    given = ScanTensors(*tensors)
    return tuple(scan_tensors(_fake_gradients(given.direction()), like(given.z, given.u)))


def fake_bidirectional_scan(saved_states: Callable, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, _, _, save = arguments
    forward, backward, _ = unflatten(tensors)
    return (
        torch.empty_like(forward.u),
        fake_checkpoints(saved_states, forward.u, forward.A, save),
        fake_checkpoints(saved_states, backward.u, backward.A, save),
    )


def fake_bidirectional_scan_backward(grad_out, *arguments) -> list[Tensor]:
    *tensors, _, _, _, _ = arguments
    forward, backward, z = unflatten(tensors)
    return [*_fake_gradients(forward), *_fake_gradients(backward), like(z, forward.u)]


def fake_scan_segment(*arguments) -> None:
    return None


def fake_conv1d(x, weight, bias, silu, reverse) -> Tensor:
    return torch.empty_like(x)


def fake_conv1d_backward(grad_out, x, weight, bias, silu, reverse) -> tuple[Tensor, ...]:
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return torch.empty_like(x), grad_weight, like(bias, x)


# Gradients. Under checkpointing, saved_tensors can be read only once. An output that was not used
# has None for its gradient: zeros for the checkpoints would be as large as they are.


def or_zeros(grad_out: Tensor | None, u: Tensor) -> Tensor:
    """The gradient of an output as large as ``u``; zeros where none arrives, as where only the last
    state was used."""
    return torch.zeros_like(u) if grad_out is None else grad_out


def only_given(arguments, grads) -> tuple[Tensor | None, ...]:
    """None for the gradients of arguments that were not given."""
    return tuple(None if x is None else grad for x, grad in zip(arguments, grads, strict=True))


def refuse_second_derivative(*_):
    raise RuntimeError('mmvim_ops has no second derivatives')


def save_scan(ctx, inputs, output) -> None:
    *tensors, ctx.delta_softplus, ctx.reverse, _ = inputs
    ctx.save_for_backward(*tensors, output[2])


def scan_backward(family: str, ctx, grad_out, grad_last_state, _):
    saved = ctx.saved_tensors
    grads = operator(family, 'scan_backward')(
        or_zeros(grad_out, saved[0]), grad_last_state, *saved, ctx.delta_softplus, ctx.reverse
    )
    *tensors, _ = saved
    return *only_given(tensors, grads), None, None, None


def save_bidirectional_scan(ctx, inputs, output) -> None:
    *tensors, ctx.delta_softplus, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def bidirectional_scan_backward(family: str, ctx, grad_out, *_):
    saved = ctx.saved_tensors
    grads = operator(family, 'bidirectional_scan_backward')(
        or_zeros(grad_out, saved[0]), *saved, ctx.delta_softplus, ctx.scale
    )
    *tensors, _, _ = saved
    return *only_given(tensors, grads), None, None, None


def save_conv1d(ctx, inputs, output) -> None:
    *tensors, ctx.silu, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def conv1d_backward(family: str, ctx, grad_out):
    saved = ctx.saved_tensors
    grads = operator(family, 'conv1d_backward')(
        or_zeros(grad_out, saved[0]), *saved, ctx.silu, ctx.reverse
    )
    return *only_given(saved, grads), None, None


FAKES = {
    'scan': fake_scan,
    'scan_backward': fake_scan_backward,
    'bidirectional_scan': fake_bidirectional_scan,
    'bidirectional_scan_backward': fake_bidirectional_scan_backward,
    'scan_segment': fake_scan_segment,
    'conv1d': fake_conv1d,
    'conv1d_backward': fake_conv1d_backward,
}
SAVES_STATES = ('scan', 'bidirectional_scan')
GRADIENTS = {
    'scan': (save_scan, scan_backward),
    'bidirectional_scan': (save_bidirectional_scan, bidirectional_scan_backward),
    'conv1d': (save_conv1d, conv1d_backward),
}


# How a gradient is registered with torch. torch.library has a function for that; what it registers
# took half of a call's time on the host.


def hidden_from_dynamo(function: Callable) -> Callable:
    """As ``torch.compiler.disable``, which takes seconds to import where nobody compiles."""
    hidden = None

    def call(*arguments):
        nonlocal hidden
        if hidden is None:
            if 'torch._dynamo' not in sys.modules:
                return function(*arguments)
            hidden = torch.compiler.disable(function)
        return hidden(*arguments)

    return call


def register_gradient(
    full: str, save: Callable | None, backward: Callable, implementation: Callable | None = None
) -> None:
    """As ``torch.library.register_autograd``, which reads the schema anew in every call.

    Args:
        full (str): Name of the operator.
        save (Callable | None): As ``setup_context`` there, with positional arguments.
        backward (Callable): Gets None for outputs whose gradient is not there.
        implementation (Callable | None): What is called where nothing (tracing, a mode, a wrapped
            tensor) stands between autograd and the operator; None leaves that to torch, too.
    """
    name = full.partition('::')[2]
    function = getattr(torch.ops.mmvim_ops, name).default
    gives_list = str(function._schema).endswith('-> Tensor[]')
    below_autograd = torch._C._AutoDispatchBelowAutograd
    keys_below = torch._C._after_autograd_keyset
    plain = (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)  # below all others

    def compute(keyset, arguments):
        keyset = keyset & keys_below
        with below_autograd():
            if implementation is not None and keyset.highestPriorityTypeId() in plain:
                return implementation(*arguments)
            return function.redispatch(keyset, *arguments)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, keyset, *arguments):
            output = compute(keyset, arguments)
            ctx.set_materialize_grads(False)
            if save is not None:
                save(ctx, arguments, output)
            return tuple(output) if gives_list else output

        @staticmethod
        def backward(ctx, *grads):
            return None, *backward(ctx, *grads)

    def kernel(keyset, *arguments):
        if not torch.is_grad_enabled() or not any(
            isinstance(x, Tensor) and x.requires_grad for x in arguments
        ):
            return compute(keyset, arguments)
        output = Differentiable.apply(keyset, *arguments)
        return list(output) if gives_list else output

    LIBRARY.impl(name, hidden_from_dynamo(kernel), 'Autograd', with_keyset=True)


def define(family: str, implementations: dict[str, Callable | None], saved_states: Callable):
    """Define the operators of a backend and tell torch of their shapes and gradients.

    Args:
        family (str): The backend's name.
        implementations (dict[str, Callable | None]): By operation; None where a library defines
            and registers it with torch when it is loaded.
        saved_states (Callable): From a length to the number of states that a scan saves.
    """
    for name, function in implementations.items():
        full = f'mmvim_ops::{family}_{name}'
        if function is not None:
            torch.library.define(full, SCHEMAS[name], tags=[torch.Tag.pt2_compliant_tag])
            torch.library.register_kernel(full, None, function)
        fake = FAKES[name]
        torch.library.register_fake(
            full, partial(fake, saved_states) if name in SAVES_STATES else fake
        )
    for name, function in implementations.items():
        full = f'mmvim_ops::{family}_{name}'
        if name in GRADIENTS:
            save, backward = GRADIENTS[name]
            register_gradient(full, save, partial(backward, family), function)
        elif name.endswith('_backward'):
            register_gradient(full, None, refuse_second_derivative, function)
