"""What ops/benchmark_gpu.py measures: both scans of a Vim block, or the whole block.

``mamba_ssm`` stands for its compiled scan called twice, the second time on flipped copies whose
output is flipped back, as the official Vim does. Either mamba_ssm or its compiled module
``selective_scan_cuda`` (ops/build_mamba_ssm.py) has to be importable for that.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvim_ops import (
    Direction,
    MixerDirection,
    available_backends,
    bidirectional_selective_scan,
    causal_conv1d,
    mamba_mixer,
)
from mmvim_ops.backends import BACKENDS
from mmvim_ops.backends.torch import scan as torch_scan

THEIRS = 'mamba_ssm'
THEIRS_WITH_OUR_CONV = 'mamba_ssm/conv'
REFERENCE = 'torch'
TAPS = 4


@dataclass
class Work:
    """What is to be computed at one size.

    Args:
        functions (dict[str, Callable]): By name, of the tensors; gives one tensor.
        inputs (dict[str, list[Tensor]]): Tensors by name, leaves that need gradients.
        exact (list[Tensor]): The same in float32, for ``reference``.
        reference (Callable): Of ``exact``.
        grad (Tensor): Of the output.
        bytes (int | None): At least to be read and written, forward; None: not counted.
        exponentials (int): At least to be computed, forward.
    """

    functions: dict[str, Callable]
    inputs: dict[str, list[Tensor]]
    exact: list[Tensor]
    reference: Callable
    grad: Tensor
    exponentials: int
    bytes: int | None = None
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def run(self, name: str, backward: bool) -> list[Tensor]:
        """The output, and with ``backward`` the gradients of all inputs."""
        if not backward:
            with torch.no_grad():
                return [self.functions[name](*self.inputs[name])]
        return both(self.functions[name], self.inputs[name], self.gradients.get(name, self.grad))

    def expected(self) -> list[Tensor]:
        with patch.object(torch_scan, 'TILE', 1 << 24):  # of a GPU's size: in fewer launches
            return both(self.reference, self.exact, self.grad.float())


def both(function: Callable, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    out = function(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad)]


def backends_here(wanted: list[str] | None) -> list[str]:
    return wanted or [n for n in available_backends() if BACKENDS[n].runs_on('cuda')]


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in tensors]


class CompiledScan(torch.autograd.Function):
    """mamba_ssm's compiled module without its Python package."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, bias, softplus):
        import selective_scan_cuda

        B, C = B.unsqueeze(1), C.unsqueeze(1)  # (B, 1, N, L)
        y, states, out = selective_scan_cuda.fwd(u, delta, A, B, C, D, z, bias, softplus)
        ctx.save_for_backward(u, delta, A, B, C, D, z, bias, states, y)
        ctx.softplus = softplus
        return out

    @staticmethod
    def backward(ctx, grad):
        import selective_scan_cuda

        *tensors, states, y = ctx.saved_tensors
        grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias, grad_z = (
            selective_scan_cuda.bwd(
                *tensors, grad.contiguous(), states, y, None, ctx.softplus, False
            )
        )
        grad_B, grad_C = grad_B.squeeze(1), grad_C.squeeze(1)
        return grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, None


def find_theirs() -> Callable | None:
    """mamba_ssm's scan: (u, delta, A, B, C, D, z, delta_bias, delta_softplus) → out."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        pass
    else:
        return selective_scan_fn
    try:
        import selective_scan_cuda  # noqa: F401
    except ImportError as error:
        print(f'left out: neither mamba_ssm nor selective_scan_cuda can be imported ({error})')
        return None
    return CompiledScan.apply


# Both scans: functions of (u, delta, A, B, C, D, bias) of both directions and z.


def our_scans(backend: str, *tensors: Tensor) -> Tensor:
    forward, backward = Direction(*tensors[:7]), Direction(*tensors[7:14])
    return bidirectional_selective_scan(
        forward, backward, tensors[14], True, scale=0.5, backend=backend
    )


def their_scans(scan: Callable, *tensors: Tensor) -> Tensor:
    z = tensors[14]
    out = scan(*tensors[:6], z, tensors[6], True)
    u, delta, A, B, C, D, bias = tensors[7:14]
    u, delta, B, C, z = (x.flip(-1) for x in (u, delta, B, C, z))
    return (out + scan(u, delta, A, B, C, D, z, bias, True).flip(-1)) * 0.5


def scan_tensors(
    batch: int, dim: int, length: int, states: int, dtype: torch.dtype, device: str = 'cuda'
) -> list[Tensor]:
    """Fifteen tensors with channels next to each other, values as in the model."""
    torch.manual_seed(0)

    def sequence(width: int) -> Tensor:
        return torch.randn(batch, length, width, device=device).to(dtype).transpose(1, 2)

    def direction() -> list:
        A = -torch.arange(1.0, states + 1, device=device).repeat(dim, 1)
        bias = torch.empty(dim, device=device).uniform_(-6.9, -2.25)  # steps of 1e-3 … 1e-1
        matrices = (sequence(states) for _ in range(2))
        return [sequence(dim), 0.1 * sequence(dim), A, *matrices, torch.ones_like(bias), bias]

    return leaves([*direction(), *direction(), sequence(dim)])


def scan_work(args, dim: int, length: int, dtype: torch.dtype, device: str = 'cuda') -> Work:
    """(y_forward + y_backward) · silu(z) / 2 by every backend and by mamba_ssm."""
    inputs = scan_tensors(args.batch, dim, length, args.states, dtype, device)
    grad = torch.randn_like(inputs[0])
    functions = {name: partial(our_scans, name) for name in backends_here(args.backends)}
    theirs = find_theirs()
    if theirs is not None:  # first, so that the ratios of the others are known at once
        functions = {THEIRS: partial(their_scans, theirs), **functions}
    work = Work(
        functions,
        dict.fromkeys(functions, inputs),
        leaves([x.float() for x in inputs]),
        partial(our_scans, REFERENCE),
        grad,
        exponentials=2 * args.batch * dim * length * args.states,
        bytes=sum(x.nbytes for x in inputs) + grad.nbytes,
    )
    if theirs is not None:
        work.inputs[THEIRS] = leaves([x.contiguous() for x in inputs])  # time in front
        work.gradients[THEIRS] = grad.contiguous()
    return work


# The block between its norm and its residual addition: functions of the tokens, both projections,
# and (conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D) of both directions.


def our_mixer(backend: str, recompute: str, *tensors: Tensor) -> Tensor:
    tokens, in_proj, out_proj = tensors[:3]
    directions = MixerDirection(*tensors[3:10]), MixerDirection(*tensors[10:17], reverse=True)
    return mamba_mixer(
        tokens, in_proj, directions, out_proj, scale=0.5, recompute=recompute, backend=backend
    )


def torch_conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    u = F.conv1d(x, weight[:, None], bias, padding=TAPS - 1, groups=x.shape[1])
    return F.silu(u[..., : x.shape[-1]]).contiguous()


def their_mixer(scan: Callable, conv1d: Callable, *tensors: Tensor) -> Tensor:
    """A Vim block around mamba_ssm's scan: sequences are (B, channels, L), the second direction
    works on a flipped copy of x and z. Autograd keeps what its operations keep.

    The official block has the kernels of causal_conv1d. Beside torch's convolution, which is
    slower, stands the one of this library.
    """
    tokens, in_proj, out_proj = tensors[:3]
    batch, length, _ = tokens.shape
    xz = in_proj @ tokens.flatten(0, 1).T  # (2 E, B L): time in front, without a copy
    xz = xz.unflatten(1, (batch, length)).transpose(0, 1)  # (B, 2 E, L)
    out = one_direction(scan, conv1d, xz, *tensors[3:10])
    out = out + one_direction(scan, conv1d, xz.flip(-1), *tensors[10:17]).flip(-1)
    return F.linear(0.5 * out.transpose(1, 2), out_proj)  # (B, L, C)


def one_direction(
    scan, conv1d, xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D
) -> Tensor:
    x, z = xz.chunk(2, dim=1)  # 2 × (B, E, L)
    rank, states = dt_proj.shape[1], A.shape[1]
    u = conv1d(x, conv_weight, conv_bias)  # (B, E, L)
    dt, B, C = (x_proj @ u).split((rank, states, states), dim=1)  # (B, R | N | N, L)
    delta = dt_proj @ dt  # (B, E, L)
    return scan(u, delta, A, B.contiguous(), C.contiguous(), D, z, dt_bias, True)


def mixer_tensors(
    batch: int, dim: int, length: int, states: int, dtype: torch.dtype, device: str = 'cuda'
) -> list[Tensor]:
    """Seventeen tensors, values as in a new model; matrices in the dtype of the tokens."""
    torch.manual_seed(0)
    width = dim // 2
    rank = -(-width // 16)

    def uniform(*shape: int, bound: float) -> Tensor:
        return torch.empty(shape, device=device).uniform_(-bound, bound).to(dtype)

    def direction() -> list:
        return [
            uniform(dim, TAPS, bound=TAPS**-0.5),
            uniform(dim, bound=TAPS**-0.5),
            uniform(rank + 2 * states, dim, bound=dim**-0.5),
            uniform(dim, rank, bound=rank**-0.5),
            torch.empty(dim, device=device).uniform_(-6.9, -2.25),
            -torch.arange(1.0, states + 1, device=device).repeat(dim, 1),
            torch.ones(dim, device=device),
        ]

    tokens = torch.randn(batch, length, width, device=device).to(dtype)
    projections = uniform(2 * dim, width, bound=width**-0.5), uniform(width, dim, bound=dim**-0.5)
    return leaves([tokens, *projections, *direction(), *direction()])


def mixer_work(args, dim: int, length: int, dtype: torch.dtype, device: str = 'cuda') -> Work:
    """The whole mixer by every backend, and built on mamba_ssm's scan."""
    inputs = mixer_tensors(args.batch, dim, length, args.states, dtype, device)
    functions = {
        f'{name}/{recompute}': partial(our_mixer, name, recompute)
        for name in backends_here(args.backends)
        for recompute in args.recompute
    }
    theirs = find_theirs()
    if theirs is not None:
        convolutions = {THEIRS: torch_conv1d, THEIRS_WITH_OUR_CONV: causal_conv1d}
        functions = {
            **{name: partial(their_mixer, theirs, conv) for name, conv in convolutions.items()},
            **functions,
        }
    return Work(
        functions,
        dict.fromkeys(functions, inputs),
        leaves([x.float() for x in inputs]),
        partial(our_mixer, REFERENCE, 'activations'),
        torch.randn_like(inputs[0]),
        exponentials=2 * args.batch * dim * length * args.states,
    )
