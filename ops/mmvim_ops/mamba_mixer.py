"""The whole token mixer of a Mamba block as one differentiable operation."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .backends import choose_backend, selected
from .calls import Direction, MixerCall, MixerDirection
from .checks import check_mixer, in_transform, refuse_forward_mode
from .interface import bidirectional_selective_scan, causal_conv1d, selective_scan
from .linear import linear

RECOMPUTE = ('activations', 'all', 'none')


def mamba_mixer(
    tokens: Tensor,
    in_proj_weight: Tensor,
    directions: Sequence[MixerDirection],
    out_proj_weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    in_proj_bias: Tensor | None = None,
    out_proj_bias: Tensor | None = None,
    scale: float = 1.0,
    recompute: str = 'activations',
    backend: str | None = None,
) -> Tensor:
    """Mix a sequence of tokens with one or two selective scans.

    With ``x, z = linear(tokens, in_proj_weight, in_proj_bias)``, each direction ``o`` computes ::

        u_o          = silu(causal_conv1d(x, conv_weight, conv_bias))
        dt, B_o, C_o = split(linear(u_o, x_proj_weight))
        y_o          = selective_scan(u_o, linear(dt, dt_proj_weight), A, B_o, C_o, D,
                                      delta_bias=dt_bias, delta_softplus=True)

    and the output is ``linear(Σ y_o · silu(z) · scale, out_proj_weight, out_proj_bias)``. This is
    algorithm 1 of Zhu et al., "Vision Mamba", arXiv:2401.09417, between its norm and its residual
    addition, and with one direction the block of Gu and Dao, "Mamba", arXiv:2312.00752, which
    ``mamba_inner_fn`` of ``mamba_ssm`` computes.

    Args:
        tokens (Tensor): (batch, length, C).
        in_proj_weight (Tensor): (2 E, C); the first E rows give x, the others z.
        directions (Sequence[MixerDirection]): One or two.
        out_proj_weight (Tensor): (C', E).
        norm_weight (Tensor | None): Take the tokens' root mean square norm, with this weight (C,),
            in place of the tokens themselves. Backward then keeps the tokens alone.
        norm_eps (float): Added to the mean square in the norm.
        in_proj_bias (Tensor | None): (2 E,).
        out_proj_bias (Tensor | None): (C',).
        scale (float): Factor of the directions' sum.
        recompute (str): What is computed again in the backward pass instead of being stored.
            ``'activations'``: all but ``tokens`` and ``in_proj``'s output, and on a GPU the scans'
            output and states. ``'all'``: all but ``tokens``. ``'none'``: nothing, except the scan's
            states, and the norm on a GPU.
        backend (str | None): As in :func:`mmvim_ops.selective_scan`.

    Returns:
        Tensor: (batch, length, C'), differentiable once.

    Raises:
        TypeError: An argument is no tensor or not of a real floating dtype.
        ValueError: A shape or device does not fit, an order is no permutation (see
            :class:`mmvim_ops.MixerDirection`), ``recompute`` or the backend is unknown.
        NotImplementedError: An argument has a forward-mode derivative.
    """
    if recompute not in RECOMPUTE:
        raise ValueError(f'recompute must be one of {RECOMPUTE}, got {recompute!r}')
    directions = [MixerDirection(*direction) for direction in directions]
    if len(directions) not in (1, 2):
        raise ValueError(f'directions must be one or two, got {len(directions)}')
    if not isinstance(scale, (int, float)):
        raise TypeError(f'scale must be a number, got {type(scale).__name__}')

    backend = selected(backend)  # what is computed again in another thread takes the same one
    weights = norm_weight, in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias
    call = MixerCall(tokens, *weights, tuple(directions), float(scale), float(norm_eps), recompute)
    check_mixer(call)
    refuse_forward_mode(
        'mamba_mixer', tokens, *weights, *(x for direction in directions for x in direction[:7])
    )
    out = choose_backend(backend, tokens.device, tokens.dtype).mamba_mixer(call)
    if out is not None:
        return out

    def project(tokens: Tensor) -> Tensor:
        if norm_weight is not None:
            tokens = F.rms_norm(tokens, norm_weight.shape, norm_weight, norm_eps)
        return linear(tokens, in_proj_weight, in_proj_bias, backend)  # (B, L, 2 E)

    def mix(xz: Tensor) -> Tensor:
        x, z = xz.transpose(1, 2).chunk(2, dim=1)  # 2 × (B, E, L)
        y = mix_channels(x, z, directions, scale, backend)  # (B, E, L)
        return linear(y.transpose(1, 2), out_proj_weight, out_proj_bias, backend)  # (B, L, C')

    # torch.export cannot read checkpoints. (torch.compiler.is_exporting came with torch 2.7.) And
    # what torch.func has wrapped cannot be computed again when its transform is over.
    whole = getattr(torch.compiler, 'is_exporting', bool)() or in_transform()
    if recompute == 'none' or whole or not torch.is_grad_enabled():
        return mix(project(tokens))
    # There is nothing random in it, and a CUDA graph cannot read the generator's state.
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if recompute == 'all':
        return again(lambda tokens: mix(project(tokens)), tokens)
    return again(mix, project(tokens))


def mix_channels(
    x: Tensor,
    z: Tensor,
    directions: Sequence[MixerDirection],
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """What :func:`mamba_mixer` does between its projections, of (B, E, L) x and z."""
    scans = [scan_inputs(x, direction, backend) for direction in directions]
    orders = [direction.order for direction in directions]
    if len(scans) == 2 and orders == [None, None]:
        reverse = [direction.reverse for direction in directions]
        if reverse == [False, True]:
            return bidirectional_selective_scan(
                *scans, z, delta_softplus=True, scale=scale, backend=backend
            )
    y = None
    for scan, direction in zip(scans, directions, strict=True):
        out = selective_scan(
            *scan[:6],
            None,
            scan.delta_bias,
            delta_softplus=True,
            reverse=direction.reverse,
            backend=backend,
        )
        if direction.order is not None:
            out = out[..., direction.order.argsort()]
        y = out if y is None else y + out
    return y * F.silu(z) * scale


def scan_inputs(x: Tensor, direction: MixerDirection, backend: str | None = None) -> Direction:
    """What the scan of one direction reads, selected by the (B, E, L) input."""
    if direction.order is not None:
        x = x[..., direction.order]
    reverse = direction.reverse if direction.conv_reverse is None else direction.conv_reverse
    u = causal_conv1d(
        x, direction.conv_weight, direction.conv_bias, reverse=reverse, backend=backend
    )
    return project_scan(u, direction, backend)


def project_scan(u: Tensor, direction: MixerDirection, backend: str | None = None) -> Direction:
    """The step size, B and C that (B, E, L) inputs select for themselves."""
    rank, states = direction.dt_proj_weight.shape[1], direction.A.shape[1]
    projected = linear(u.transpose(1, 2), direction.x_proj_weight, backend=backend)
    dt, B, C = projected.split((rank, states, states), dim=-1)  # (B, L, R | N | N)
    # The bias goes to the scan, which adds it in float32 whatever the autocast type is.
    delta = linear(dt, direction.dt_proj_weight, backend=backend).transpose(1, 2)  # (B, E, L)
    B, C = B.transpose(1, 2), C.transpose(1, 2)  # (B, N, L)
    return Direction(u, delta, direction.A, B, C, direction.D, direction.dt_bias)
