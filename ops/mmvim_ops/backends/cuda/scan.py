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
    unflatten,
)
from . import structures
from .library import (
    DTYPES,
    address,
    call,
    cast,
    gradient,
    matrix,
    memory,
    packed,
    sequence,
    stream,
)
from .plan import count_groups, find_plan, kernel_dtype
from .structures import NO_DIRECTION, NO_GRADIENT, NO_SEQUENCE, filled

SUMMED = ('B', 'C', 'A', 'D', 'delta_bias')  # over what blocks leave
NO_GRADIENTS = (0,) * 14  # what a direction has from grad_last_state on
MOST_STATES_OF_TWO = 64  # of two directions in one launch: what any GPU has shared memory for


def saved_states(length):
    """One at the start of every segment."""
    return (length + structures.SEGMENT - 1) // structures.SEGMENT


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
    u, delta, A, B, C, D, delta_bias = direction
    missing = states - A.shape[1]
    if not missing and count_groups(B, C) == groups:
        return direction

    def matrix(m: Tensor) -> Tensor:
        if missing:
            m = F.pad(m, (0, missing) if m.ndim == 2 else (0, 0, 0, missing))
        if m.ndim == 2 or groups == 1 or (m.ndim == 4 and m.shape[1] == groups):
            return m
        return (m.unsqueeze(1) if m.ndim == 3 else m).repeat_interleave(
            groups // (m.shape[1] if m.ndim == 4 else 1), dim=1
        )

    A = F.pad(A, (0, missing)) if missing else A
    return Direction(u, delta, A, matrix(B), matrix(C), D, delta_bias)


def like_in(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What kernels write a result of theirs to: where it belongs, if that has the dtype."""
    return x if x.dtype is dtype else torch.empty_like(x, dtype=dtype)


class Launch:
    """Tensors of a scan in the dtypes that its kernels read, and how it is cut."""

    def __init__(self, directions, reverse, z, softplus: bool, scale: float, backward: bool):
        dtype = kernel_dtype(z, directions)
        self.dtype, self.reverse, self.softplus, self.scale = dtype, reverse, softplus, scale
        self.directions = [
            Direction(
                *(cast(u, dtype), cast(delta, dtype), packed(A), cast(B, dtype), cast(C, dtype)),
                *(packed(D), packed(bias)),
            )
            for u, delta, A, B, C, D, bias in directions
        ]
        self.z = cast(z, dtype)
        self.plan = find_plan(directions, dtype, z is not None, backward)
        self.backward, self.device = backward, directions[0].u.device
        floats = self.plan.layout.floats
        self.memory = memory(floats, self.device) if floats else None

    def direction(self, i: int, *more) -> tuple:
        """The values of a structure; ``more`` are those after ``delta_bias``."""
        u, delta, A, B, C, D, delta_bias = self.directions[i]
        return (
            *(self.reverse[i], *sequence(u), *sequence(delta), *matrix(B), *matrix(C)),
            *(A.data_ptr(), address(D), address(delta_bias), *more),
        )

    def partial(self, shared: Tensor | None) -> tuple[int, ...]:
        """Where one direction leaves the other its part of ``shared``, which may be a slice."""
        if shared is None or len(self.directions) == 1:
            return NO_SEQUENCE
        if not self.plan.partial:
            return sequence(shared)
        _, channels, length = shared.shape
        strides = (1, channels) if shared.stride(1) == 1 else (length, 1)
        return (address(self.memory) + self.plan.layout.partial, channels * length, *strides)

    def scan(self, of_directions: list, out, grad_out, grad_z) -> structures.Scan:
        plan, begin = self.plan, address(self.memory)
        directions, batch, groups, per_group, length, states = plan.sizes
        partial = self.partial(grad_z if self.backward else out)
        between = (
            (begin + plan.layout.ends, begin + plan.layout.sums) if plan.chunks > 1 else (0, 0)
        )
        values = (
            *(DTYPES[self.dtype], self.device.index or 0, stream(self.device), batch),
            *(groups * per_group, length, states, groups, directions, self.softplus),
            *(plan.chunks, plan.chunk_length, plan.cut.warps, plan.cut.lanes, plan.splits),
            *(self.scale, *sequence(self.z), *sequence(out), *partial),
            *(*sequence(grad_out), *sequence(grad_z), *between, *of_directions[0]),
            *(of_directions[1] if directions == 2 else NO_DIRECTION),
        )
        return filled(structures.Scan, values)


def run_forward(directions, reverse, z, softplus, scale, out, checkpoints, last_state=None) -> None:
    launch = Launch(directions, reverse, z, softplus, scale, backward=False)
    result = like_in(out, launch.dtype)
    scan = launch.scan(
        [
            launch.direction(i, address(last_state), address(saved), *NO_GRADIENTS)
            for i, saved in enumerate(checkpoints)
        ],
        *(result, None, None),
    )
    call('mmvim_scan_forward', launch.device, scan)
    if result is not out:
        out.copy_(result)


def run_backward(
    directions, reverse, z, softplus, scale, grad_out, grad_last_state, checkpoints, grads, grad_z
) -> None:
    """Write the gradients of the directions and of z."""
    launch = Launch(directions, reverse, z, softplus, scale, backward=True)
    plan, begin, dtype = launch.plan, launch.memory.data_ptr(), launch.dtype
    grad_out, grad_last_state = cast(grad_out, dtype), packed(grad_last_state)
    of_directions, totals, copies = [], [], []
    for i, (given, saved, into) in enumerate(zip(directions, checkpoints, grads, strict=True)):
        sums = []
        # In the order of structures.Direction and Totals.
        for name, offset in zip(SUMMED, plan.layout.of_directions[i], strict=True):
            grad = getattr(into, name)
            if offset is None:
                sums.append(grad.data_ptr())
                totals += NO_GRADIENT
            else:
                sums.append(begin + offset)
                totals += gradient(grad, getattr(given, name))
        grad_u, grad_delta = like_in(into.u, dtype), like_in(into.delta, dtype)
        copies += [(into.u, grad_u), (into.delta, grad_delta)]
        of_directions.append(
            launch.direction(
                *(i, 0, address(saved), address(grad_last_state)),
                *(*sequence(grad_u), *sequence(grad_delta), *sums),
            )
        )
    result = None if z is None else like_in(grad_z, dtype)
    copies.append((grad_z, result))
    scan = launch.scan(of_directions, None, grad_out, result)
    call('mmvim_scan_backward', launch.device, scan)
    call(
        'mmvim_scan_finish',
        launch.device,
        scan,
        filled(structures.Totals * len(directions), totals),
    )
    for grad, result in copies:
        if result is not None and result is not grad:
            grad.copy_(result)


def scan(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Operator ``cuda_scan``."""
    *tensors, softplus, reverse, save = arguments
    given = ScanTensors(*tensors)
    out, last_state, checkpoints = fake_scan(saved_states, *arguments)
    if out.numel() == 0:
        last_state.zero_()
    else:
        run_forward(
            *([given.direction()], [reverse], given.z, softplus, 1.0, out),
            *([checkpoints if save else None], last_state),
        )
    return out, last_state, checkpoints


def scan_backward(grad_out, grad_last_state, *arguments) -> tuple[Tensor, ...]:
    """Operator ``cuda_scan_backward``."""
    *tensors, checkpoints, softplus, reverse = arguments
    given = ScanTensors(*tensors)
    grads = fake_scan_backward(grad_out, grad_last_state, *arguments)
    if grad_out.numel() == 0:
        return tuple(grad.zero_() for grad in grads)
    into = ScanTensors(*grads)
    run_backward(
        *([given.direction()], [reverse], given.z, softplus, 1.0, grad_out, grad_last_state),
        *([checkpoints], [into.direction()], into.z),
    )
    return grads


def bidirectional_scan(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Operator ``cuda_bidirectional_scan``."""
    *tensors, softplus, scale, save = arguments
    *directions, z = unflatten(tensors)
    out, *checkpoints = fake_bidirectional_scan(saved_states, *arguments)
    if out.numel() > 0:
        kept = checkpoints if save else [None, None]
        run_forward(directions, [False, True], z, softplus, scale, out, kept)
    return out, *checkpoints


def bidirectional_scan_backward(grad_out, *arguments) -> list[Tensor]:
    """Operator ``cuda_bidirectional_scan_backward``."""
    *tensors, checkpoints, checkpoints_b, softplus, scale = arguments
    *directions, z = unflatten(tensors)
    grads = fake_bidirectional_scan_backward(grad_out, *arguments)
    if grad_out.numel() == 0:
        return [grad.zero_() for grad in grads]
    *into, grad_z = unflatten(grads)
    run_backward(
        *(directions, [False, True], z, softplus, scale, grad_out, None),
        *([checkpoints, checkpoints_b], into, grad_z),
    )
    return grads


IMPLEMENTATIONS = {
    'scan': scan,
    'scan_backward': scan_backward,
    'bidirectional_scan': bidirectional_scan,
    'bidirectional_scan_backward': bidirectional_scan_backward,
}
