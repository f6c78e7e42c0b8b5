"""The operations that a backend need not have: composed of its scan and of PyTorch operations."""

import torch.nn.functional as F
from torch import Tensor

from ..calls import BidirectionalCall, ScanCall, SegmentCall
from ..naive import compute_dtype, per_channel


def bidirectional_scan(scan, call: BidirectionalCall) -> Tensor:
    """Two scans, added and gated."""
    dtype = compute_dtype(call.forward.u.dtype)
    out = sum(
        scan(ScanCall(direction, None, call.delta_softplus, reverse))[0].to(dtype)
        for direction, reverse in ((call.forward, False), (call.backward, True))
    )
    if call.z is not None:
        out = out * F.silu(call.z.to(dtype))
    return (out * call.scale).to(call.forward.u.dtype)


def scan_segment_(scan, call: SegmentCall) -> None:
    """A scan that starts at zero, and what the state at the start adds: the recurrence is linear.

    Makes tensors of (batch, channels, states, length of the segment).
    """
    u, delta, A, _, C, _, delta_bias = call.direction
    if u.numel() == 0:
        return
    dtype = call.state.dtype
    y, last = scan(ScanCall(call.direction, None, call.delta_softplus, call.reverse))
    delta = delta.to(dtype)
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)[:, None]
    if call.delta_softplus:
        delta = F.softplus(delta)
    elapsed = delta.flip(-1).cumsum(-1).flip(-1) if call.reverse else delta.cumsum(-1)  # (B, D, L)
    carried = (elapsed[:, :, None] * A.to(dtype)[:, :, None]).exp() * call.state[..., None]
    y = y.to(dtype) + (carried * per_channel(C.to(dtype), u)).sum(2)  # (B, D, L)
    call.state.copy_(last + carried[..., 0 if call.reverse else -1])
    if call.accumulate:
        y = y + call.out.to(dtype)
    if call.z is not None:
        y = y * F.silu(call.z.to(dtype))
    call.out.copy_(y * call.scale)
