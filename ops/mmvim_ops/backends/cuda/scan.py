"""The scan's operators over the kernels of ``csrc/cuda``.

Buffers come from torch's allocator and nothing waits for the GPU, so that calls can be captured in
CUDA graphs. The kernels compute in float32; double precision is left to other backends.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...calls import BidirectionalCall, Direction
from ..operators import (
    ScanTensors,
    fake_bidirectional_scan,
    fake_bidirectional_scan_backward,
    fake_scan,
    fake_scan_backward,
    like,
    scan_tensors,
    unflatten,
)
from .library import constant
from .plan import Inputs, Plan, count_groups, kernel_dtype

MOST_STATES_OF_TWO = 64  # of two directions in one launch: what any GPU has shared memory for


def saved_states(length):
    """One at the start of every segment."""
    segment = constant('segment')
    return (length + segment - 1) // segment


def fit_into_one_launch(call: BidirectionalCall) -> BidirectionalCall | None:
    """The call with equal numbers of states and groups; None where there are too many for both
    directions at once."""
    forward, backward = call.forward, call.backward
    states = max(forward.A.shape[1], backward.A.shape[1])
    groups = math.lcm(count_groups(forward.B, forward.C), count_groups(backward.B, backward.C))
    if states > MOST_STATES_OF_TWO or forward.u.shape[1] % groups:
        return None
    return BidirectionalCall(
        _widen(forward, states, groups), _widen(backward, states, groups), *call[2:]
    )


def _widen(direction: Direction, states: int, groups: int) -> Direction:
    """The same scan with so many states and groups."""
    missing = states - direction.A.shape[1]

    def matrix(m: Tensor) -> Tensor:
        if m.ndim == 2:
            return F.pad(m, (0, missing)) if missing else m
        m = F.pad(m, (0, 0, 0, missing)) if missing else m
        if groups == 1 or (m.ndim == 4 and m.shape[1] == groups):
            return m
        return (m.unsqueeze(1) if m.ndim == 3 else m).repeat_interleave(
            groups // (m.shape[1] if m.ndim == 4 else 1), dim=1
        )

    u, delta, A, B, C, D, delta_bias = direction
    return Direction(u, delta, F.pad(A, (0, missing)), matrix(B), matrix(C), D, delta_bias)


def _cast(grad: Tensor | None, x: Tensor | None, u: Tensor) -> Tensor:
    """In the dtype of the argument; an empty one where it was not given."""
    return like(None, u) if x is None else grad.to(x.dtype)


def _plan(directions: list[Direction], reverse: list[bool], z, softplus: bool, scale: float):
    dtype = kernel_dtype(z, directions)
    inputs = [Inputs(*pair, dtype) for pair in zip(directions, reverse, strict=True)]
    return Plan(inputs, None if z is None else z.to(dtype), softplus, scale)


def scan(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Operator ``cuda_scan``."""
    *tensors, softplus, reverse, save = arguments
    given = ScanTensors(*tensors)
    out, last_state, checkpoints = fake_scan(saved_states, *arguments)
    if given.u.numel() == 0:
        return out, last_state.zero_(), checkpoints
    plan = _plan([given.direction()], [reverse], given.z, softplus, 1.0)
    result = out if plan.dtype == out.dtype else torch.empty_like(out, dtype=plan.dtype)
    plan.forward(result, [checkpoints if save else None], last_state)
    return result.to(out.dtype), last_state, checkpoints


def scan_backward(grad_out, grad_last_state, *arguments) -> tuple[Tensor, ...]:
    """Operator ``cuda_scan_backward``."""
    *tensors, checkpoints, softplus, reverse = arguments
    given = ScanTensors(*tensors)
    if given.u.numel() == 0:
        grads = fake_scan_backward(grad_out, grad_last_state, *arguments)
        return tuple(grad.zero_() for grad in grads)
    plan = _plan([given.direction()], [reverse], given.z, softplus, 1.0)
    (grads,), grad_z = plan.backward(
        grad_out.to(plan.dtype), grad_last_state.float().contiguous(), [checkpoints]
    )
    grads = scan_tensors(grads, grad_z)
    return tuple(_cast(grad, x, given.u) for grad, x in zip(grads, given, strict=True))


def bidirectional_scan(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Operator ``cuda_bidirectional_scan``."""
    *tensors, softplus, scale, save = arguments
    *directions, z = unflatten(tensors)
    out, *checkpoints = fake_bidirectional_scan(saved_states, *arguments)
    if out.numel() == 0:
        return out, *checkpoints
    plan = _plan(directions, [False, True], z, softplus, scale)
    result = out if plan.dtype == out.dtype else torch.empty_like(out, dtype=plan.dtype)
    plan.forward(result, checkpoints if save else [None, None])
    return result.to(out.dtype), *checkpoints


def bidirectional_scan_backward(grad_out, *arguments) -> list[Tensor]:
    """Operator ``cuda_bidirectional_scan_backward``."""
    *tensors, checkpoints, checkpoints_b, softplus, scale = arguments
    *directions, z = unflatten(tensors)
    if grad_out.numel() == 0:
        grads = fake_bidirectional_scan_backward(grad_out, *arguments)
        return [grad.zero_() for grad in grads]
    plan = _plan(directions, [False, True], z, softplus, scale)
    grads, grad_z = plan.backward(grad_out.to(plan.dtype), None, [checkpoints, checkpoints_b])
    grads = [*grads[0], *grads[1], grad_z]
    return [_cast(grad, x, tensors[0]) for grad, x in zip(grads, tensors, strict=True)]


IMPLEMENTATIONS = {
    'scan': scan,
    'scan_backward': scan_backward,
    'bidirectional_scan': bidirectional_scan,
    'bidirectional_scan_backward': bidirectional_scan_backward,
}
