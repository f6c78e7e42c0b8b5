"""Backend 'torch': the scan in plain PyTorch operations, parallel over chunks of the sequence.

The length is split into chunks of K steps. All chunks advance together, so that K vectorised steps
(instead of L) give every chunk's states as if it began from zero; a short loop over the chunks then
carries the true states across the borders, and K more steps add what was carried in. Every factor
is an exp(Δ A) or a product of them, never a quotient, so nothing overflows for A < 0.

Backward recomputes the states, so only the arguments are kept. Channels are worked through in tiles
that bound the memory: no tensor of (batch, channels, length, states) exists.

Inside, a tile is laid out (K, batch, chunks, groups, states, channels): one step is one contiguous
slab and the innermost dimension is long enough to vectorise.
"""

import math
from itertools import pairwise, product

import torch
import torch.nn.functional as F
from torch import Tensor

from ...calls import ScanCall
from ...naive import compute_dtype
from ..operators import refuse_second_derivative

TILE = 1 << 21  # elements in one tile: with the few others of its size it fits into the cache


def scan(call: ScanCall) -> tuple[Tensor, Tensor]:
    """The output and the last state."""
    u, delta, A, B, C, D, delta_bias = call.direction
    dtype = compute_dtype(u.dtype)
    if call.reverse:
        u, delta = u.flip(-1), delta.flip(-1)
        B, C = (x.flip(-1) if x.ndim > 2 else x for x in (B, C))
    x, delta = u.to(dtype), delta.to(dtype)
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)[:, None]
    if call.delta_softplus:
        delta = F.softplus(delta)
    B, C = (m.unsqueeze(1) if m.ndim == 3 else m for m in (B.to(dtype), C.to(dtype)))
    y, last_state = torch.ops.mmvim_ops.torch_scan(x, delta, A.to(dtype), B, C)
    if D is not None:
        y = y + D.to(dtype)[:, None] * x
    if call.reverse:
        y = y.flip(-1)
    if call.z is not None:
        y = y * F.silu(call.z.to(dtype))
    return y.to(u.dtype), last_state


class Chunks:
    """How (batch, channels, length) is cut into steps, chunks and tiles.

    Time t = chunk · K + k is element [k, :, chunk]; the end of the last chunk may be padding.
    """

    def __init__(self, u: Tensor, A: Tensor, B: Tensor, C: Tensor):
        self.batch, self.channels, self.length = u.shape
        self.states = A.shape[1]
        self.groups = max(m.shape[1] if m.ndim == 4 else 1 for m in (B, C))
        # 3 K operations for the steps and one per chunk: fewest at K = √(L / 3).
        self.steps = max(1, round(math.sqrt(self.length / 3)))
        self.chunks = -(-self.length // self.steps)

    def split(self, x: Tensor) -> Tensor:
        """Bring time to the front: (batch, ..., length) → (K, batch, chunks, ...)."""
        padding = self.steps * self.chunks - self.length
        if padding:
            x = F.pad(x, (0, padding))
        x = x.unflatten(-1, (self.chunks, self.steps))  # (B, ..., chunks, K)
        return x.movedim((-1, -2), (0, 2)).contiguous()  # (K, B, chunks, ...)

    def join(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`split`."""
        x = x.movedim((0, 2), (-1, -2)).flatten(-2)  # (B, ..., chunks · K)
        return x[..., : self.length]

    def split_channels(self, x: Tensor) -> Tensor:
        """(batch, channels, length) → (K, batch, chunks, groups, channels / groups)."""
        return self.split(x).unflatten(-1, (self.groups, -1))

    def split_matrix(self, m: Tensor) -> Tensor:
        """A and a constant B, C → (groups, states, channels); others → (K, batch, chunks, groups,
        states, 1)."""
        if m.ndim == 2:
            return m.unflatten(0, (self.groups, -1)).transpose(1, 2).contiguous()
        return self.split(m).unsqueeze(-1)

    def join_matrix(self, m: Tensor) -> Tensor:
        """The inverse of :meth:`split_matrix`."""
        if m.ndim == 3:
            return m.transpose(1, 2).flatten(0, 1)  # (D, N)
        return self.join(m.squeeze(-1))  # (B, G, N, L)

    def tiles(self):
        """Slices of batch, groups and channels per group that bound a tile's size."""
        per_group = self.channels // self.groups
        room = TILE // (self.steps * self.chunks * self.states)
        channels = min(per_group, max(32, room))
        batch = min(self.batch, max(1, room // channels))
        groups = min(self.groups, max(1, room // (channels * batch)))
        return product(
            *(
                [slice(i, i + size) for i in range(0, whole, size)]
                for whole, size in (
                    (self.batch, batch),
                    (self.groups, groups),
                    (per_group, channels),
                )
            )
        )

    def decay(self, delta: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """exp(Δ A) of every step, and the product of it over each chunk."""
        decay = (delta.unsqueeze(-2) * A).exp_()  # (K, b, chunks, g, N, d)
        # Padding must not touch the states, not even where A is infinite (0 · inf is NaN).
        decay[self.length - (self.chunks - 1) * self.steps :, :, -1] = 1
        return decay, (delta.sum(0).unsqueeze(-2) * A).exp_()  # (b, chunks, g, N, d)


def solve_(decay: Tensor, term: Tensor, chunk_decay: Tensor, backwards: bool = False) -> Tensor:
    """Turn ``term`` in place into the solution h of h_t = decay_t h_{t−1} + term_t, h₋₁ = 0.

    ``backwards`` runs the recurrence from the last time step to the first.
    """
    steps, chunks = list(range(len(term))), list(range(term.shape[2]))
    if backwards:
        steps.reverse()
        chunks.reverse()
    for before, k in pairwise(steps):
        term[k].addcmul_(decay[k], term[before])
    if len(chunks) == 1:
        return term
    carried = torch.zeros_like(term[0])  # (b, chunks, g, N, d)
    end = term[steps[-1]]
    for before, c in pairwise(chunks):
        torch.addcmul(end[:, before], chunk_decay[:, before], carried[:, before], out=carried[:, c])
    for k in steps:
        term[k].add_(carried.mul_(decay[k]))
    return term


def contract_states(m: Tensor, h: Tensor) -> Tensor:
    """Σ over states of B or C times h: (K, b, chunks, g, N, d) → (K, b, chunks, g, d)."""
    if m.ndim == 3:
        return (m * h).sum(-2)
    return (m.transpose(-1, -2) @ h).squeeze(-2)


def matrix_gradient(m: Tensor, h: Tensor, x: Tensor) -> Tensor:
    """Gradient of B or C: h ⊙ x summed over whatever ``m`` was expanded along."""
    if m.ndim == 3:
        return (h * x.unsqueeze(-2)).sum((0, 1, 2))  # (g, N, d)
    return h @ x.unsqueeze(-1)  # (K, b, chunks, g, N, 1)


def matrix_tile(m: Tensor, b: slice, g: slice, d: slice):
    """Index of a tile in a matrix that :meth:`Chunks.split_matrix` laid out."""
    return (g, slice(None), d) if m.ndim == 3 else (slice(None), b, slice(None), g)


@torch.library.custom_op(
    'mmvim_ops::torch_scan',
    mutates_args=(),
    schema='(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C) -> (Tensor, Tensor)',
)
def torch_scan(u, delta, A, B, C):
    """y_t = C_t · h_t and the last state; all of one dtype, B and C (D, N) or (B, G, N, L)."""
    y = torch.empty_like(u)
    last_state = u.new_zeros(u.shape[0], u.shape[1], A.shape[1])
    if u.numel() == 0:
        return y, last_state
    plan = Chunks(u, A, B, C)
    k, c = (plan.length - 1) % plan.steps, -1
    grouped_last = last_state.view(plan.batch, plan.groups, -1, plan.states)
    with torch.autocast(u.device.type, enabled=False):
        us, deltas = plan.split_channels(u), plan.split_channels(delta)
        As, Bs, Cs = (plan.split_matrix(m) for m in (A, B, C))
        ys = torch.empty_like(us)  # (K, B, chunks, G, D / G)
        for b, g, d in plan.tiles():
            tile = (slice(None), b, slice(None), g, d)
            B_, C_ = (m[matrix_tile(m, b, g, d)] for m in (Bs, Cs))
            decay, chunk_decay = plan.decay(deltas[tile], As[g, :, d])
            term = (deltas[tile] * us[tile]).unsqueeze(-2) * B_  # (K, b, chunks, g, N, d)
            h = solve_(decay, term, chunk_decay)
            ys[tile] = contract_states(C_, h)
            grouped_last[b, g, d] = h[k, :, c].transpose(-1, -2)
        y.copy_(plan.join(ys.flatten(-2)))
    return y, last_state


@torch_scan.register_fake
def _(u, delta, A, B, C):
    return torch.empty_like(u), u.new_empty(u.shape[0], u.shape[1], A.shape[1])


@torch.library.custom_op(
    'mmvim_ops::torch_scan_backward',
    mutates_args=(),
    schema='(Tensor grad_y, Tensor grad_last, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C)'
    ' -> (Tensor, Tensor, Tensor, Tensor, Tensor)',
)
def torch_scan_backward(grad_y, grad_last, u, delta, A, B, C):
    """Gradients of u, delta, A, B, C.

    With G_t the gradient that reaches h_t and X_t = decay_t G_t the part of it that goes on to
    h_{t−1}: X_t = decay_t X_{t+1} + decay_t C_t g_t is the same recurrence run backwards in time,
    G_t = C_t g_t + X_{t+1}, and X_t h_{t−1} is the gradient of Δ_t A.
    """
    grads = tuple(torch.zeros_like(x) for x in (u, delta, A, B, C))
    if u.numel() == 0:
        return grads
    plan = Chunks(u, A, B, C)
    k, c = (plan.length - 1) % plan.steps, -1
    grad_last = grad_last.reshape(plan.batch, plan.groups, -1, plan.states).transpose(-1, -2)
    with torch.autocast(u.device.type, enabled=False):
        us, deltas, gs = (plan.split_channels(x) for x in (u, delta, grad_y))
        As, Bs, Cs = (plan.split_matrix(m) for m in (A, B, C))
        d_us, d_deltas, d_As, d_Bs, d_Cs = (torch.zeros_like(x) for x in (us, deltas, As, Bs, Cs))
        for b, g, d in plan.tiles():
            tile = (slice(None), b, slice(None), g, d)
            u_, delta_, g_, A_ = us[tile], deltas[tile], gs[tile], As[g, :, d]
            in_B, in_C = matrix_tile(Bs, b, g, d), matrix_tile(Cs, b, g, d)
            decay, chunk_decay = plan.decay(delta_, A_)
            scaled = delta_ * u_
            h = solve_(decay, scaled.unsqueeze(-2) * Bs[in_B], chunk_decay)
            d_Cs[in_C] += matrix_gradient(Cs, h, g_)

            G = g_.unsqueeze(-2) * Cs[in_C]  # (K, b, chunks, g, N, d)
            G[k, :, c] += grad_last[b, g, :, d]
            X = solve_(decay, decay * G, chunk_decay, backwards=True)
            G[:-1] += X[1:]
            G[-1, :, :-1] += X[0, :, 1:]
            d_Bs[in_B] += matrix_gradient(Bs, G, scaled)
            d_scaled = contract_states(Bs[in_B], G)  # (K, b, chunks, g, d)

            X[1:] *= h[:-1]
            X[0, :, 1:] *= h[-1, :, :-1]
            X[0, :, 0] = 0
            d_As[g, :, d] += (X * delta_.unsqueeze(-2)).sum((0, 1, 2))
            d_deltas[tile] = d_scaled * u_ + (X * A_).sum(-2)
            d_us[tile] = d_scaled * delta_
        for grad, x in zip(grads[:2], (d_us, d_deltas), strict=True):
            grad.copy_(plan.join(x.flatten(-2)))
        for grad, x in zip(grads[2:], (d_As, d_Bs, d_Cs), strict=True):
            grad.copy_(plan.join_matrix(x))
    return grads


@torch_scan_backward.register_fake
def _(grad_y, grad_last, u, delta, A, B, C):
    return tuple(torch.empty_like(x) for x in (u, delta, A, B, C))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_y, grad_last):
    return torch.ops.mmvim_ops.torch_scan_backward(grad_y, grad_last, *ctx.saved_tensors)


torch_scan.register_autograd(_backward, setup_context=_save)
torch_scan_backward.register_autograd(refuse_second_derivative)
