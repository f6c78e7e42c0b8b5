"""The specification: the selective scan written as its equation, one time step after another.

Every backend is tested against this file. It runs on any device and in any floating dtype, and
autograd differentiates it (any number of times); it is slow and keeps every state for backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that states are kept in: float64 for float64 input, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_channel(x: Tensor, u: Tensor) -> Tensor:
    """Expand B or C to one (N, L) matrix per batch element and channel: (B, D, N, L)."""
    batch, channels, length = u.shape
    if x.ndim == 2:
        return x[None, :, :, None].expand(batch, -1, -1, length)
    if x.ndim == 3:
        return x[:, None].expand(-1, channels, -1, -1)
    return x.repeat_interleave(channels // x.shape[1], dim=1)


def selective_scan_naive(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=False,
    *,
    reverse=False,
):
    """Arguments, result and equation as :func:`mmvim_ops.selective_scan`; nothing is checked."""
    dtype = compute_dtype(u.dtype)
    x, delta, A = u.to(dtype), delta.to(dtype), A.to(dtype)
    B, C = per_channel(B.to(dtype), u), per_channel(C.to(dtype), u)  # (B, D, N, L)
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)

    Bs, Cs = B.unbind(-1), C.unbind(-1)  # backward of B[..., t] would fill a whole B each time
    h = x.new_zeros(*x.shape[:2], A.shape[1])  # (B, D, N)
    outputs: list[Tensor] = [None] * x.shape[2]
    for t in reversed(range(len(outputs))) if reverse else range(len(outputs)):
        decay = torch.exp(delta[:, :, t, None] * A)
        h = decay * h + (delta[:, :, t] * x[:, :, t])[..., None] * Bs[t]
        outputs[t] = (h * Cs[t]).sum(-1)  # (B, D)
    y = torch.stack(outputs, dim=-1) if outputs else torch.zeros_like(x)  # (B, D, L)

    if D is not None:
        y = y + D.to(dtype)[:, None] * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    y = y.to(u.dtype)
    return (y, h) if return_last_state else y


def causal_conv1d_naive(x, weight, bias=None, *, reverse=False, activation='silu'):
    """Arguments, result and equation as :func:`mmvim_ops.causal_conv1d`; nothing is checked."""
    dtype = compute_dtype(x.dtype)
    weight = weight.to(dtype).flatten(1)  # (D, taps)
    past = (x.flip(-1) if reverse else x).to(dtype)
    out = torch.zeros_like(past)
    for k in reversed(range(weight.shape[1])):
        out = out + weight[:, k, None] * past
        past = F.pad(past, (1, 0))[..., :-1]  # one step later
    if reverse:
        out = out.flip(-1)
    if bias is not None:
        out = out + bias.to(dtype)[:, None]
    return (F.silu(out) if activation == 'silu' else out).to(x.dtype)


def mamba_mixer_naive(
    tokens,
    in_proj_weight,
    directions,
    out_proj_weight,
    *,
    norm_weight=None,
    norm_eps=1e-5,
    in_proj_bias=None,
    out_proj_bias=None,
    scale=1.0,
):
    """Arguments, result and equation as :func:`mmvim_ops.mamba_mixer`; nothing is checked."""
    if norm_weight is not None:
        mean_square = tokens.square().mean(-1, keepdim=True)
        tokens = tokens / (mean_square + norm_eps).sqrt() * norm_weight
    x, z = F.linear(tokens, in_proj_weight, in_proj_bias).transpose(1, 2).chunk(2, dim=1)
    y = 0
    for o in directions:
        order = torch.arange(x.shape[2]) if o.order is None else o.order
        conv_reverse = o.reverse if o.conv_reverse is None else o.conv_reverse
        u = causal_conv1d_naive(x[..., order], o.conv_weight, o.conv_bias, reverse=conv_reverse)
        rank, states = o.dt_proj_weight.shape[1], o.A.shape[1]
        selected = F.linear(u.transpose(1, 2), o.x_proj_weight)
        dt, B, C = selected.split((rank, states, states), dim=-1)  # (B, L, R | N | N)
        delta = F.linear(dt, o.dt_proj_weight).transpose(1, 2)  # (B, E, L)
        B, C = B.transpose(1, 2), C.transpose(1, 2)  # (B, N, L)
        out = selective_scan_naive(
            u, delta, o.A, B, C, o.D, None, o.dt_bias, True, reverse=o.reverse
        )
        y = y + out[..., order.argsort()]
    y = y * F.silu(z) * scale
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)
