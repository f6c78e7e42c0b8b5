"""The token mixer of a Vim block: selective state-space scans over the patch sequence."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules import module as nn_module

from mmvim_ops import MixerDirection, causal_conv1d, mamba_mixer, selective_scan

from .arguments import integer, number, one_of
from .directions import DIRECTIONS, Scan
from .linear import Linear, linear

__all__ = ['MambaMixer', 'is_plain', 'widen']


class MambaMixer(nn.Module):
    """Selective state-space mixing of a token sequence, in one or more directions.

    Implements Algorithm 1 of `Vision Mamba <https://arxiv.org/abs/2401.09417>`_ between its
    normalisation and its residual addition. With ``x, z = in_proj(tokens)``, each direction ``o``
    computes ::

        u_o          = SiLU(conv1d_o(x))                  # depthwise, causal in its direction
        dt, B_o, C_o = split(x_proj_o(u_o))
        delta_o      = softplus(dt_proj_o(dt))
        y_o          = scan(u_o, delta_o, A_o, B_o, C_o, D_o) * SiLU(z)

    and the output is ``out_proj`` of the reduced ``y_o``. Parameters carry the names of the
    official checkpoints, see :class:`~mmvim.models.directions.Scan`.

    Layers may be replaced or wrapped (adapters, weight norm, pruning, hooks): they are called then.
    A layer in place of ``conv1d`` gets (B, E, d_conv - 1 + L) and returns (B, E, L).

    Args:
        embed_dims (int): Channels C of the tokens.
        d_state (int): State size N of each channel.
        d_conv (int): Kernel width of the depthwise convolution.
        expand (int): The scans work on E = expand * C channels.
        directions (str): A key of :data:`~mmvim.models.directions.DIRECTIONS`, whose scans the
            mixer runs. Flipping the sequence around it is the backbone's part.
        reduction (str): ``'mean'`` or ``'sum'`` of the directions, where these leave a choice.
        depth (int): Number of blocks in the backbone; the output projection starts smaller by
            its square root, so that the residual stream keeps its scale.
        layer_scale (float, optional): Initial value of a learned per-channel output scale.
        recompute (str): As in :func:`mmvim_ops.mamba_mixer`.
        backend (str, optional): As in :func:`mmvim_ops.mamba_mixer`.

    Raises:
        TypeError, ValueError: For an argument outside of this; the message names it.
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
        recompute: str = 'activations',
        backend: str | None = None,
    ) -> None:
        super().__init__()
        one_of('directions', directions, tuple(DIRECTIONS))
        self.scans = DIRECTIONS[directions].scans
        self.scale = DIRECTIONS[directions].scale(reduction)
        self.recompute, self.backend = recompute, backend
        self.d_state, self.d_conv = integer('d_state', d_state), integer('d_conv', d_conv)
        self.dt_rank = math.ceil(integer('embed_dims', embed_dims) / 16)
        self.inner_dims = integer('expand', expand) * embed_dims  # E

        self.in_proj = Linear(embed_dims, 2 * self.inner_dims, bias=False)
        self.out_proj = Linear(self.inner_dims, embed_dims, bias=False)
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(depth)  # nn.Linear starts kaiming-uniform, a = √5
        self.gamma = None
        if layer_scale is not None:
            layer_scale = number('layer_scale', layer_scale)
            self.gamma = nn.Parameter(torch.full((embed_dims,), layer_scale))
        for scan in self.scans:
            self._add_parameters(scan)

    def _add_parameters(self, scan: Scan) -> None:
        """Create what a scan names and does not share with one before it."""
        inner, ranks = self.inner_dims, self.dt_rank + 2 * self.d_state
        parts = {
            scan.conv1d: lambda: nn.Conv1d(inner, inner, self.d_conv, groups=inner),
            scan.x_proj: lambda: Linear(inner, ranks, bias=False),
            scan.dt_proj: self._new_dt_proj,
            scan.A_log: self._new_A_log,
            scan.D: lambda: nn.Parameter(torch.ones(inner)),
        }
        for name, build in parts.items():
            if not hasattr(self, name):
                setattr(self, name, build())

    def _new_A_log(self) -> nn.Parameter:
        """log(-A) with A = -(1 … N) in every channel (S4D-Real)."""
        n = torch.arange(1, self.d_state + 1, dtype=torch.float32)
        return nn.Parameter(n.log().repeat(self.inner_dims, 1))  # (E, N)

    def _new_dt_proj(self) -> nn.Module:
        dt_proj = Linear(self.dt_rank, self.inner_dims)
        nn.init.uniform_(dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        # softplus(bias) is log-uniform in [1e-3, 1e-1]: time scales of 10 to 1000 tokens.
        log_dt = torch.empty(self.inner_dims).uniform_(math.log(1e-3), math.log(1e-1))
        dt = log_dt.exp().clamp_(min=1e-4)
        with torch.no_grad():
            dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        return dt_proj

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that stand for time scales, not for linear maps."""
        return {scan.A_log for scan in self.scans}

    def forward(
        self, tokens: Tensor, *orders: Tensor | None, norm: nn.RMSNorm | None = None
    ) -> Tensor:
        """Mix (B, L, C) tokens; returns the same shape.

        Args:
            tokens (Tensor): (B, L, C).
            orders (Tensor | None): For each scan the order in which it reads, (L,) int64; None, or
                no order at all, for that of the tokens.
            norm (nn.RMSNorm, optional): Applied to the tokens first. The fused op then need not
                store what it gives.
        """
        scans = list(zip(self.scans, orders or [None] * len(self.scans), strict=True))
        if self._all_plain():
            out = mamba_mixer(
                tokens,
                self.in_proj.weight,
                self._weights(scans),
                self.out_proj.weight,
                norm_weight=None if norm is None else norm.weight,
                norm_eps=1e-5 if norm is None else norm.eps,
                scale=self.scale,
                recompute=self.recompute,
                backend=self.backend,
            )
        else:
            tokens = tokens if norm is None else norm(tokens)
            xz = self.in_proj(tokens).transpose(1, 2)  # (B, 2 E, L)
            first, *others = (self._scan(xz, *scan) for scan in scans)
            y = sum(others, first) * self.scale  # (B, E, L)
            out = self.out_proj(y.transpose(1, 2))  # (B, L, C)
        return out if self.gamma is None else out * self.gamma

    def _all_plain(self) -> bool:
        """Whether the weights may go to the fused op. Otherwise the layers are called."""
        if torch.jit.is_tracing():
            return False
        layers = self._modules.values()  # the projections and convolutions, no others
        return all(is_plain(layer, Linear, nn.Conv1d) for layer in layers)

    def _weights(self, scans: list[tuple[Scan, Tensor | None]]) -> list[MixerDirection]:
        """What the fused op needs of each scan and its order."""
        return [
            self._weights_of(*scan, A) for scan, A in zip(scans, self._all_states(), strict=True)
        ]

    def _weights_of(self, scan: Scan, order: Tensor | None, A: Tensor) -> MixerDirection:
        conv1d, dt_proj = getattr(self, scan.conv1d), getattr(self, scan.dt_proj)
        return MixerDirection(
            conv1d.weight,
            conv1d.bias,
            getattr(self, scan.x_proj).weight,
            dt_proj.weight,
            widen(dt_proj.bias),
            A,
            widen(getattr(self, scan.D)),
            scan.reverse,
            scan.conv_reverse,
            order,
        )

    def _scan(self, xz: Tensor, scan: Scan, order: Tensor | None) -> Tensor:
        """One scan of (B, 2 E, L) inputs and gates by calls of its layers: (B, E, L)."""
        if order is not None:
            xz = xz[..., order]
        x, z = xz.chunk(2, dim=1)
        u = self._convolve(x, getattr(self, scan.conv1d), scan.conv_reverse)  # (B, E, L)
        selected = getattr(self, scan.x_proj)(u.transpose(1, 2))
        dt, B, C = selected.split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        dt_proj, bias = getattr(self, scan.dt_proj), None
        if is_plain(dt_proj, Linear):
            # The scan adds the bias in float32 whatever the autocast type is.
            delta, bias = linear(dt, dt_proj.weight, backend=self.backend), widen(dt_proj.bias)
        else:
            delta = dt_proj(dt)
        y = selective_scan(
            u,
            delta.transpose(1, 2),
            self._states(scan),
            B.transpose(1, 2),
            C.transpose(1, 2),
            widen(getattr(self, scan.D)),
            z,
            bias,
            delta_softplus=True,
            reverse=scan.reverse,
            backend=self.backend,
        )
        return y if order is None else y[..., order.argsort()]

    def _convolve(self, x: Tensor, conv1d: nn.Module, reverse: bool) -> Tensor:
        """Causal convolution and SiLU of (B, E, L); ``reverse`` sees the tokens behind."""
        if is_plain(conv1d, nn.Conv1d):
            return causal_conv1d(
                x, conv1d.weight, conv1d.bias, reverse=reverse, backend=self.backend
            )
        x = x.flip(2) if reverse else x
        u = F.silu(conv1d(F.pad(x, (self.d_conv - 1, 0))))
        return u.flip(2) if reverse else u

    def _states(self, scan: Scan) -> Tensor:
        """A = -exp(A_log), always negative: states decay. (E, N)."""
        return -widen(getattr(self, scan.A_log)).exp()

    def _all_states(self) -> list[Tensor]:
        """Those of all scans. Computed in every call: an edit of ``A_log.data`` leaves no trace by
        which one could tell that an A kept from before is out of date."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return [self._states(scan) for scan in self.scans]
        # On a GPU two launches, however many scans.
        found = torch._foreach_exp([widen(getattr(self, scan.A_log)) for scan in self.scans])
        torch._foreach_neg_(found)
        return list(found)


def widen(tensor: Tensor) -> Tensor:
    """In float32, or in float64 if it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# A parameter as it is, and as torch.export sees it: a tensor without data.
PLAIN = nn.Parameter, FakeTensor


def original_class(module: nn.Module) -> type:
    """Its class, from which torch.export may derive one of its own for a proxy."""
    classes = type(module).__mro__
    proxies = [c.__module__ == 'torch.fx.experimental.proxy_tensor' for c in classes]
    return classes[len(classes) - proxies[::-1].index(True)] if any(proxies) else classes[0]


def is_plain(module: nn.Module, *classes: type) -> bool:
    """Whether a call of ``module`` does nothing but what one of ``classes`` does with its weights.

    Adapters and quantisation replace a layer, parametrisations its class. Pruning and weight norm
    add hooks, sharding makes its parameters another kind of tensor.
    """
    if type(module) not in classes and original_class(module) not in classes:
        return False
    for parameter in module._parameters.values():
        if parameter is not None and type(parameter) not in PLAIN:
            return False
    return (
        'forward' not in module.__dict__
        and not module._forward_pre_hooks
        and not module._forward_hooks
        and not module._backward_pre_hooks
        and not module._backward_hooks
        and not nn_module._global_forward_pre_hooks
        and not nn_module._global_forward_hooks
        and not nn_module._global_backward_pre_hooks
        and not nn_module._global_backward_hooks
    )
