"""The token mixer of a Vim block: selective state-space scans over the patch sequence."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mmvim_ops import (
    Direction,
    bidirectional_selective_scan,
    causal_conv1d,
    selective_scan,
)

from .linear import Linear, linear

__all__ = ['MambaMixer']

# What a mixer can do by itself. The other two directions of the backbone, 'block' and
# 'sequence', flip the tokens around mixers that are themselves one-directional.
MIXER_DIRECTIONS = ('ssm_conv', 'ssm', 'none')


class MambaMixer(nn.Module):
    """Selective state-space mixing of a token sequence, in one or both directions.

    Implements Algorithm 1 of `Vision Mamba <https://arxiv.org/abs/2401.09417>`_ between its
    normalisation and its residual addition. With ``x, z = in_proj(tokens)``, each direction ``o``
    computes ::

        u_o          = SiLU(conv1d_o(x))                  # depthwise, causal in its direction
        dt, B_o, C_o = split(x_proj_o(u_o))
        delta_o      = softplus(dt_proj_o(dt))
        y_o          = scan(u_o, delta_o, A_o, B_o, C_o, D_o) * SiLU(z)

    and the output is ``out_proj`` of the reduced ``y_o``. Parameters carry the names of the
    official checkpoints; the backward direction's end in ``_b``.

    Args:
        embed_dims (int): Channels C of the tokens.
        d_state (int): State size N of each channel.
        d_conv (int): Kernel width of the depthwise convolution.
        expand (int): The scans work on E = expand * C channels.
        directions (str): ``'ssm_conv'`` scans both ways, each way with parameters of its own.
            ``'ssm'`` scans both ways but shares everything except A. ``'none'`` scans forward only.
        reduction (str): ``'mean'`` or ``'sum'`` of the two directions of ``'ssm_conv'``. The two
            scans of ``'ssm'`` are always summed, as in the paper's ablation.
        depth (int): Number of blocks in the backbone; the output projection starts smaller by
            its square root, so that the residual stream keeps its scale.
        layer_scale (float, optional): Initial value of a learned per-channel output scale.
    """

    def __init__(
        self,
        embed_dims: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        directions: str = 'ssm_conv',
        reduction: str = 'mean',
        depth: int = 1,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        if directions not in MIXER_DIRECTIONS:
            raise ValueError(f'directions must be one of {MIXER_DIRECTIONS}, got {directions!r}')
        self.directions = directions
        self.reduction = reduction
        self.d_state = d_state
        self.dt_rank = math.ceil(embed_dims / 16)
        self.inner_dims = inner_dims = expand * embed_dims  # E

        self.in_proj = Linear(embed_dims, 2 * inner_dims, bias=False)
        self.out_proj = Linear(inner_dims, embed_dims, bias=False)
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(depth)  # nn.Linear starts kaiming-uniform, a = √5
        self.gamma = None
        if layer_scale is not None:
            self.gamma = nn.Parameter(torch.full((embed_dims,), float(layer_scale)))

        self.conv1d, self.x_proj, self.dt_proj = self._projections(inner_dims, d_conv)
        self.A_log, self.D = self._log_states(inner_dims), nn.Parameter(torch.ones(inner_dims))
        if directions != 'none':
            self.A_b_log = self._log_states(inner_dims)
        if directions == 'ssm_conv':
            self.conv1d_b, self.x_proj_b, self.dt_proj_b = self._projections(inner_dims, d_conv)
            self.D_b = nn.Parameter(torch.ones(inner_dims))

    def _projections(self, inner_dims: int, d_conv: int) -> tuple[nn.Module, ...]:
        """The layers that turn x into u, delta, B and C of one direction."""
        conv1d = nn.Conv1d(inner_dims, inner_dims, d_conv, groups=inner_dims)
        x_proj = Linear(inner_dims, self.dt_rank + 2 * self.d_state, bias=False)
        dt_proj = nn.Linear(self.dt_rank, inner_dims)
        nn.init.uniform_(dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        # softplus(bias) is log-uniform in [1e-3, 1e-1]: time scales of 10 to 1000 tokens.
        log_dt = torch.empty(inner_dims).uniform_(math.log(1e-3), math.log(1e-1))
        dt = log_dt.exp().clamp_(min=1e-4)
        with torch.no_grad():
            dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        return conv1d, x_proj, dt_proj

    def _log_states(self, inner_dims: int) -> nn.Parameter:
        """log(-A) with A = -(1 … N) in every channel (S4D-Real)."""
        n = torch.arange(1, self.d_state + 1, dtype=torch.float32)
        return nn.Parameter(n.log().repeat(inner_dims, 1))  # (E, N)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mix (B, L, C) tokens; returns the same shape."""
        x, z = self.in_proj(tokens).transpose(1, 2).chunk(2, dim=1)  # 2 × (B, E, L)
        out = self.out_proj(self._mix(x, z).transpose(1, 2))  # (B, L, C)
        return out if self.gamma is None else out * self.gamma

    def _mix(self, x: Tensor, z: Tensor) -> Tensor:
        """Scan (B, E, L) inputs gated by z in all directions; returns the same shape."""
        forward = self.scan_inputs(x)
        if self.directions == 'none':
            return selective_scan(*forward[:6], z, forward.delta_bias, delta_softplus=True)
        backward = self.scan_inputs(x, backward=True, shared=forward)
        return bidirectional_selective_scan(
            forward, backward, z, delta_softplus=True, scale=self.scale
        )

    @property
    def scale(self) -> float:
        """Factor of the two directions' sum."""
        return 0.5 if self.directions == 'ssm_conv' and self.reduction == 'mean' else 1.0

    def scan_inputs(
        self, x: Tensor, backward: bool = False, margin: int = 0, shared: Direction | None = None
    ) -> Direction:
        """What the scan of one direction reads, selected by the (B, E, L) input.

        Args:
            x (Tensor): (B, E, margin + L); for ``'ssm_conv'`` backward (B, E, L + margin).
            backward (bool): The direction.
            margin (int): Steps of x that only the convolution sees: those it needs from outside.
            shared (Direction, optional): The forward direction for the same x, where it is known;
                ``'ssm'`` takes all but A from it.
        """
        conv1d, x_proj, dt_proj, D = self.conv1d, self.x_proj, self.dt_proj, self.D
        A = state_matrix(self.A_b_log if backward else self.A_log)
        own = backward and self.directions == 'ssm_conv'
        if own:
            conv1d, x_proj, dt_proj, D = self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.D_b
        elif shared is not None:
            return Direction(*shared[:2], A, *shared[3:])  # torch 2.4 does not trace _replace
        u = causal_conv1d(x, conv1d.weight, conv1d.bias, reverse=own)
        u = u[..., : u.shape[-1] - margin] if own else u[..., margin:]  # (B, E, L)
        sizes = (self.dt_rank, self.d_state, self.d_state)
        dt, B, C = x_proj(u.transpose(1, 2)).split(sizes, dim=-1)  # (B, L, dt_rank | N | N)
        # The bias goes to the scan, which adds it in float32 whatever the autocast type is.
        delta = linear(dt, dt_proj.weight).transpose(1, 2)  # (B, E, L)
        B, C = B.transpose(1, 2), C.transpose(1, 2)  # (B, N, L)
        return Direction(u, delta, A, B, C, D.float(), dt_proj.bias.float())


def state_matrix(A_log: Tensor) -> Tensor:
    """A = -exp(A_log), always negative, in float32: states decay."""
    return -A_log.float().exp()  # (E, N)
