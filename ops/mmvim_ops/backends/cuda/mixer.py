"""The whole mixer of two directions with as few launches and as little host time as there can be.

Every step is called directly: nothing is checked or dispatched again. What both directions have is
in one tensor, the direction its first dimension, so that one launch serves both.

No cast of a weight is kept from one call to the next. ``parameter.data.copy_(...)`` changes neither
the version nor the address of a parameter, so nobody could tell that the cast is out of date.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...calls import Direction, MixerCall, MixerDirection
from ..operators import fake_checkpoints, like, needs_gradient, refuse_second_derivative
from . import library
from .conv1d import conv1d_backward, conv1d_pair
from .scan import MOST_STATES_OF_TWO, run_backward, run_forward, saved_states

SHARED = 6  # tensors of a MixerCall, which come first in it
OF_DIRECTION = 7  # tensors of a MixerDirection, which come first in it
PLAIN = (Tensor, torch.nn.Parameter)
REVERSE = [False, True]  # of the two scans
ALIGNMENT = 8  # columns: cuBLAS has slow kernels only for rows that begin anywhere


class Options(NamedTuple):
    """What of a call is no tensor, and what autocast says."""

    scale: float
    norm_eps: float
    recompute: str
    conv_reverse: tuple[bool, bool]
    dtype: torch.dtype  # of all that is not a parameter of the convolution or of the scan


class Weights(NamedTuple):
    """Parameters as the steps read them; ``x_proj`` and ``dt_proj`` are those of both directions.

    ``tokens`` are the normalised ones.
    """

    tokens: Tensor  # (B, L, C)
    into: Tensor
    into_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    x_proj: Tensor  # (2, R + 2 N, E)
    dt_proj: Tensor  # (2, E, R)
    conv: tuple[tuple[Tensor, Tensor | None], ...]  # (E, taps) and (E,) of both directions


class Selected(NamedTuple):
    """What the scans read of both directions."""

    u: Tensor  # (2, B, L, E)
    projected: Tensor  # (2, B L, R + 2 N and more): dt, B and C, then what nobody reads
    delta: Tensor  # (2, B L, E)


def why_not(call: MixerCall) -> str | None:
    """Why the mixer is composed of the single operations; None where this file computes it."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return 'compilers see the single operations'
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0:
        return 'a transform or a mode sees the single operations'
    first, *others = call.directions
    if [bool(direction.reverse) for direction in call.directions] != REVERSE:
        return 'it scans forward and backward'
    if first.order is not None or others[0].order is not None:
        return 'it reads tokens in their order'
    for name in ('x_proj_weight', 'dt_proj_weight'):
        if getattr(first, name).shape != getattr(others[0], name).shape:
            return 'both directions must have as many states and ranks'
    if first.A.shape[1] > MOST_STATES_OF_TWO:
        return f'it takes at most {MOST_STATES_OF_TWO} states'
    taps = {direction.conv_weight.shape[-1] for direction in call.directions}
    if len(taps) > 1 or max(taps) > library.constant('most_taps'):
        return f'both must have as many taps, at most {library.constant("most_taps")}'
    if call.tokens.numel() == 0:
        return 'there is nothing to compute'
    tensors = _tensors(call)
    if any(x is not None and type(x) not in PLAIN for x in tensors):
        return 'it takes plain tensors'
    dtype = _dtype(call)
    if dtype not in library.DTYPES:
        return f'it does not compute in {dtype}'
    if not torch.is_autocast_enabled(call.tokens.device.type):
        products = [*call[:SHARED]]
        for direction in call.directions:
            products += direction.x_proj_weight, direction.dt_proj_weight
        if any(x is not None and x.dtype is not dtype for x in products):
            return 'tokens and what they are multiplied with must have one dtype'
    return None


def _dtype(call: MixerCall) -> torch.dtype:
    device_type = call.tokens.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return call.tokens.dtype


def _tensors(call: MixerCall) -> list[Tensor | None]:
    first, second = call.directions
    return [*call[:SHARED], *first[:OF_DIRECTION], *second[:OF_DIRECTION]]


def mamba_mixer(call: MixerCall) -> Tensor:
    """For what :func:`why_not` lets through."""
    conv_reverse = tuple(
        bool(direction.reverse if direction.conv_reverse is None else direction.conv_reverse)
        for direction in call.directions
    )
    options = Options(call.scale, call.norm_eps, call.recompute, conv_reverse, _dtype(call))
    tensors = _tensors(call)
    with torch._C._DisableAutocast():  # the casts are made here, together
        if needs_gradient(*tensors):
            return _Mixer.apply(options, *tensors)
        return _forward(options, tensors, save=False)[0]


# Steps.


class _Casts:
    """Copies of tensors in other dtypes, made together in one launch for each pair of dtypes."""

    def __init__(self):
        self.pairs = {}

    def _add(self, source: Tensor, target: Tensor) -> None:
        targets, sources = self.pairs.setdefault((source.dtype, target.dtype), ([], []))
        targets.append(target)
        sources.append(source)

    def to(self, x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if x is None or x.dtype is dtype:
            return x
        target = torch.empty_like(x, dtype=dtype)
        self._add(x, target)
        return target

    def stack(self, first: Tensor, second: Tensor, dtype: torch.dtype) -> Tensor:
        both = torch.empty((2, *first.shape), dtype=dtype, device=first.device)
        for source, target in zip((first, second), both.unbind(0), strict=True):
            self._add(source, target)
        return both

    def make(self) -> None:
        for targets, sources in self.pairs.values():
            torch._foreach_copy_(targets, sources)


def _split(tensors) -> tuple[list, MixerDirection, MixerDirection]:
    """Those that both directions share, and those of each."""
    end = SHARED + OF_DIRECTION
    return tensors[:SHARED], MixerDirection(*tensors[SHARED:end]), MixerDirection(*tensors[end:])


def _norm(options: Options, tokens: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return tokens
    return F.rms_norm(tokens, weight.shape, weight, options.norm_eps)


def _prepare(options: Options, tensors, normalised: Tensor) -> Weights:
    (_, _, into, into_bias, out, out_bias), *directions = _split(tensors)
    first, second = directions
    casts, dtype = _Casts(), options.dtype
    weights = Weights(
        *(casts.to(x, dtype) for x in (normalised, into, into_bias, out, out_bias)),
        casts.stack(first.x_proj_weight, second.x_proj_weight, dtype),
        casts.stack(first.dt_proj_weight, second.dt_proj_weight, dtype),
        tuple(
            (
                casts.to(o.conv_weight.flatten(1), torch.float32),
                casts.to(o.conv_bias, torch.float32),
            )
            for o in directions
        ),
    )
    casts.make()
    return weights


def _convolve(options: Options, x: Tensor, weights: Weights) -> Tensor:
    """u of both directions, (2, B, L, E), of a (B, E, L) input."""
    batch, channels, length = x.shape
    u = torch.empty((2, batch, length, channels), dtype=x.dtype, device=x.device)
    first, second = (
        (*parameters, reverse)
        for parameters, reverse in zip(weights.conv, options.conv_reverse, strict=True)
    )
    conv1d_pair(x, first, second, silu=True, outs=u.mT.unbind(0))
    return u


def _select(options: Options, xz: Tensor, weights: Weights) -> Selected:
    """All between ``in_proj`` and the scans."""
    inner = xz.shape[2] // 2
    u = _convolve(options, xz[..., :inner].mT, weights)
    width = weights.x_proj.shape[1]
    projected = u.new_empty(2, u.shape[1] * u.shape[2], _aligned(width))
    torch.bmm(u.view(2, -1, inner), weights.x_proj.mT, out=projected[..., :width])
    dt = projected[..., : weights.dt_proj.shape[2]]
    return Selected(u, projected, torch.bmm(dt, weights.dt_proj.mT))


def _aligned(columns: int) -> int:
    return -(-columns // ALIGNMENT) * ALIGNMENT


def _directions(selected: Selected, first: MixerDirection, second: MixerDirection) -> list:
    """The scans' arguments: views of what was selected, and parameters."""
    _, batch, length, inner = selected.u.shape
    states = first.A.shape[1]
    u = selected.u.mT.unbind(0)  # (B, E, L)
    delta = selected.delta.view(2, batch, length, inner).mT.unbind(0)
    rank = first.dt_proj_weight.shape[1]
    projected = selected.projected.view(2, batch, length, -1)[..., rank : rank + 2 * states]
    B, C = projected.mT.split(states, dim=2)  # (2, B, N, L)
    return [
        Direction(u[i], delta[i], o.A, B[i], C[i], o.D, o.dt_bias)
        for i, o in enumerate((first, second))
    ]


def _scan(options: Options, xz: Tensor, directions: list, save: bool) -> tuple[Tensor, list]:
    """The gated sum of both scans, (B, L, E), and their checkpoints."""
    batch, length, inner = *xz.shape[:2], xz.shape[2] // 2
    y = torch.empty((batch, length, inner), dtype=xz.dtype, device=xz.device)
    checkpoints: list[Tensor | None] = [None, None]
    if save:
        checkpoints = [fake_checkpoints(saved_states, d.u, d.A, True) for d in directions]
    z = xz[..., inner:].mT
    run_forward(directions, REVERSE, z, True, options.scale, y.mT, checkpoints)
    return y, checkpoints


def _forward(options: Options, tensors, save: bool) -> tuple:
    """The output and all that backward could use."""
    _, first, second = _split(tensors)
    weights = _prepare(options, tensors, _norm(options, tensors[0], tensors[1]))
    xz = F.linear(weights.tokens, weights.into, weights.into_bias)
    selected = _select(options, xz, weights)
    y, checkpoints = _scan(options, xz, _directions(selected, first, second), save)
    return F.linear(y, weights.out, weights.out_bias), xz, y, checkpoints, selected


# Gradients.


class _Mixer(torch.autograd.Function):
    """Keeps what ``recompute`` says.

    ``'activations'`` keeps the scans' result and checkpoints besides ``in_proj``'s output: without
    them the scans, which take the most time, would run again.
    """

    @staticmethod
    def forward(ctx, options: Options, *tensors):
        keep = options.recompute != 'all'
        out, xz, y, checkpoints, selected = _forward(options, tensors, save=keep)
        kept = (xz, y, *checkpoints) if keep else ()
        if options.recompute == 'none':
            kept += selected
        ctx.options = options
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *kept)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        count = SHARED + 2 * OF_DIRECTION
        if grad_out is None:
            return (None,) * (1 + count)
        saved = ctx.saved_tensors  # under checkpointing they can be read only once
        with torch._C._DisableAutocast(), torch.no_grad():
            grads = _backward(
                ctx.options, ctx.needs_input_grad[1:], grad_out, saved[:count], saved[count:]
            )
        if torch.is_grad_enabled():
            grads = _Once.apply(grads, grad_out, *saved[:count])
        return None, *grads


class _Once(torch.autograd.Function):
    """Gradients as results of what they were computed from, so that nobody takes their derivative
    for zero."""

    @staticmethod
    def forward(ctx, grads, *_):
        return tuple(grads)

    @staticmethod
    def backward(ctx, *_):
        refuse_second_derivative()


def _backward(options: Options, needed, grad_out: Tensor, tensors, kept) -> list[Tensor | None]:
    """The gradients of the tensors; None for those that are not needed."""
    shared, first, second = _split(tensors)
    needed_shared, *needed_own = _split(needed)
    # Of the norm torch has the gradient; it reads the tokens alone.
    tokens, norm_weight = (
        None if x is None else x.detach().requires_grad_(wanted)
        for x, wanted in zip(shared[:2], needed, strict=False)
    )
    with torch.enable_grad():
        normalised = _norm(options, tokens, norm_weight)

    weights = _prepare(options, tensors, normalised.detach())
    if kept:
        xz, y, *checkpoints = kept[:4]
    else:
        xz = F.linear(weights.tokens, weights.into, weights.into_bias)
    selected = Selected(*kept[4:]) if len(kept) > 4 else _select(options, xz, weights)
    directions = _directions(selected, first, second)
    if not kept:
        y, checkpoints = _scan(options, xz, directions, save=True)

    batch, length, inner = y.shape
    rows, states, rank = batch * length, first.A.shape[1], first.dt_proj_weight.shape[1]
    grads: list[Tensor | None] = [None] * len(tensors)
    grad_out = grad_out.reshape(rows, -1)
    if needed_shared[4]:
        grads[4] = torch.mm(grad_out.mT, y.view(rows, inner))
    if needed_shared[5]:
        grads[5] = grad_out.sum(0)
    grad_y = torch.mm(grad_out, weights.out).view(y.shape)

    def both(channels: int) -> Tensor:
        return torch.empty((2, batch, length, channels), dtype=y.dtype, device=y.device)

    grad_xz = torch.empty_like(xz)
    grad_u, grad_delta, grad_B, grad_C = both(inner), both(inner), both(states), both(states)
    into = [
        Direction(
            *(u, delta, torch.empty_like(d.A, memory_format=torch.contiguous_format), B, C),
            *(like(d.D, u), like(d.delta_bias, u)),
        )
        for d, u, delta, B, C in zip(
            directions,
            *(x.mT.unbind(0) for x in (grad_u, grad_delta, grad_B, grad_C)),
            strict=True,
        )
    ]
    x, z = xz.mT.split(inner, dim=1)  # (B, E, L)
    grad_x, grad_z = grad_xz.mT.split(inner, dim=1)
    run_backward(
        *(directions, REVERSE, z, True, options.scale, grad_y.mT, None, checkpoints, into, grad_z)
    )

    grad_u, grad_delta = grad_u.view(2, rows, inner), grad_delta.view(2, rows, inner)
    grad_B, grad_C = grad_B.view(2, rows, states), grad_C.view(2, rows, states)
    columns = [torch.bmm(grad_delta, weights.dt_proj), grad_B, grad_C]
    width = rank + 2 * states
    # Aligned rows again, filled up with any numbers: nobody reads what becomes of them.
    while (missing := _aligned(width) - sum(part.shape[2] for part in columns)) > 0:
        columns.append(grad_B[..., :missing])
    grad_projected = torch.cat(columns, dim=2)
    grad_x_proj = grad_dt_proj = (None, None)
    if any(own.x_proj_weight for own in needed_own):
        u = selected.u.view(2, rows, inner)
        grad_x_proj = torch.bmm(grad_projected.mT, u)[:, :width].unbind(0)
    if any(own.dt_proj_weight for own in needed_own):
        dt = selected.projected[..., : min(_aligned(rank), width)]
        grad_dt_proj = torch.bmm(grad_delta.mT, dt)[..., :rank].unbind(0)
    grad_u.baddbmm_(grad_projected[..., :width], weights.x_proj)

    parts = []
    for i, (parameters, conv_reverse) in enumerate(
        zip(weights.conv, options.conv_reverse, strict=True)
    ):
        part, grad_weight, grad_bias = conv1d_backward(
            grad_u[i].view(y.shape).mT, x, *parameters, True, conv_reverse
        )
        parts.append(part)
        begin = SHARED + OF_DIRECTION * i
        grads[begin : begin + OF_DIRECTION] = (
            *(grad_weight.view(tensors[begin].shape), grad_bias, grad_x_proj[i], grad_dt_proj[i]),
            *(into[i].delta_bias, into[i].A, into[i].D),
        )
    torch.add(*parts, out=grad_x)

    grad_rows, grad_normalised = grad_xz.view(rows, 2 * inner), None
    if needed_shared[2]:
        grads[2] = torch.mm(grad_rows.mT, weights.tokens.reshape(rows, -1))
    if needed_shared[3]:
        grads[3] = grad_rows.sum(0)
    if normalised.requires_grad:
        grad_normalised = torch.mm(grad_rows, weights.into).view(normalised.shape)

    casts = _Casts()
    grads = [
        casts.to(grad, x.dtype) if x is not None and wanted else None
        for grad, x, wanted in zip(grads, tensors, needed, strict=True)
    ]
    grad_normalised = casts.to(grad_normalised, normalised.dtype)
    casts.make()
    if grad_normalised is not None:
        wanted = [x for x in (tokens, norm_weight) if x is not None and x.requires_grad]
        found = iter(torch.autograd.grad(normalised, wanted, grad_normalised))
        grads[:2] = (
            next(found) if x is not None and x.requires_grad else None
            for x in (tokens, norm_weight)
        )
    return grads
