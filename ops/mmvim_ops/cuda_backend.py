"""Backend 'cuda': calls the kernels of ``csrc/cuda``, compiled by nvcc, and registers the operators.

The library has neither torch nor Python in it: ctypes passes it addresses, strides and a stream, so
that one build serves every version of torch. Buffers come from torch's allocator and nothing waits
for the GPU, so that calls can be captured in CUDA graphs.
"""

import ctypes
import math
import os
from ctypes import c_double, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import torch_conv, torch_scan
from .registration import (
    fake_bidirectional_scan_backward,
    fake_conv1d,
    fake_conv1d_backward,
    fake_scan_backward,
    like,
    needs_gradient,
    register_gradients,
)

LIBRARY = Path(__file__).with_name('_cuda.so')
BUILD_COMMAND = 'python ops/build_cuda.py'
# The same kernels compiled for the CPU, for tests: a library's path (tests/ops/cuda_emulation).
EMULATED = os.environ.get('MMVIM_OPS_CUDA_EMULATED')

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # Dtype of csrc/cuda/device.h
SEGMENT = 64  # kSegment of csrc/cuda/args.h: steps between two checkpoints
MOST_STATES = 256  # kMostStates
FEW_STATES = 16  # more than these are computed in float32 only
CONV_STEPS = 64  # kConvSteps
MOST_TAPS = 32  # kMostTaps

# How a scan is cut, from counting and not yet from measuring on a GPU. A multiprocessor's
# four schedulers are taken to be busy with WARPS warps each; chunks cost a second pass.
WARPS = 2
SECOND_PASS = 1.8
SHORTEST_CHUNK = 2 * SEGMENT


class Sequence(ctypes.Structure):
    """See csrc/cuda/args.h, as for all structures here."""

    _fields_ = [('data', c_void_p), *((name, c_int64) for name in ('batch', 'channel', 'time'))]


class Matrix(ctypes.Structure):
    _fields_ = [
        ('data', c_void_p),
        *((name, c_int64) for name in ('varying', 'batch', 'group', 'channel', 'state', 'time')),
    ]


class Side(ctypes.Structure):
    _fields_ = [
        ('reverse', c_int64),
        ('u', Sequence),
        ('delta', Sequence),
        ('B', Matrix),
        ('C', Matrix),
        *((name, c_void_p) for name in ('A', 'D', 'delta_bias', 'last_state', 'checkpoints')),
        ('grad_last_state', c_void_p),
        ('grad_u', Sequence),
        ('grad_delta', Sequence),
        *((f'grad_{name}', c_void_p) for name in ('B', 'C', 'A', 'D', 'delta_bias')),
    ]


class Scan(ctypes.Structure):
    _fields_ = [
        *(
            (name, c_int64)
            for name in (
                *('dtype', 'device', 'stream', 'batch', 'channels', 'length', 'states', 'groups'),
                *('directions', 'softplus', 'chunks', 'chunk_length', 'warps', 'splits'),
            )
        ),
        ('scale', c_double),
        *((name, Sequence) for name in ('z', 'out', 'partial', 'grad_out', 'grad_z')),
        ('ends', c_void_p),
        ('sums', c_void_p),
        ('side', Side * 2),
    ]


class Convolution(ctypes.Structure):
    _fields_ = [
        *(
            (name, c_int64)
            for name in (
                *('dtype', 'device', 'stream', 'batch', 'channels', 'length', 'taps', 'silu'),
                'reverse',
            )
        ),
        ('x', Sequence),
        ('out', Sequence),
        ('weight', c_void_p),
        ('bias', c_void_p),
        ('grad_out', Sequence),
        ('grad_x', Sequence),
        ('grad_parameters', c_void_p),
    ]


ENTRIES = {
    'mmvim_scan_forward': [ctypes.POINTER(Scan)],
    'mmvim_scan_backward': [ctypes.POINTER(Scan)],
    'mmvim_conv_forward': [ctypes.POINTER(Convolution)],
    'mmvim_conv_backward': [ctypes.POINTER(Convolution)],
    'mmvim_device_limits': [c_int64, ctypes.POINTER(c_int64)],
}


def _load(path: Path) -> ctypes.CDLL | str:
    """The library, or what is wrong with it."""
    if not path.exists():
        return f'it is not compiled; in the source tree, run: {BUILD_COMMAND}'
    try:
        library = ctypes.CDLL(str(path))
        library.mmvim_version.restype = c_int64
        if library.mmvim_version() != ctypes.sizeof(Scan) + ctypes.sizeof(Convolution):
            return f'its library is of another version; compile it again: {BUILD_COMMAND}'
        for name, arguments in ENTRIES.items():
            getattr(library, name).argtypes = arguments
            getattr(library, name).restype = ctypes.c_char_p
        for name, arguments in (('mmvim_channels_per_warp', 1), ('mmvim_shared_bytes', 4)):
            getattr(library, name).argtypes = [c_int64] * arguments
            getattr(library, name).restype = c_int64
    except (OSError, AttributeError) as error:
        return f'its library does not load ({error}); compile it again: {BUILD_COMMAND}'
    return library


_compiled = _load(LIBRARY)
_emulated = _load(Path(EMULATED)) if EMULATED else None


def missing() -> str | None:
    """Why the backend cannot run on this machine; None where it can."""
    if isinstance(_emulated, ctypes.CDLL):
        return None
    if isinstance(_compiled, str):
        return _compiled
    return None if torch.cuda.is_available() else 'there is no CUDA device'


def _library(device_type: str) -> ctypes.CDLL:
    library = _compiled if device_type == 'cuda' else _emulated
    if not isinstance(library, ctypes.CDLL):
        raise RuntimeError(f'mmvim_ops: no kernels for {device_type}: {library}')
    return library


def _call(entry: str, u: Tensor, arguments) -> None:
    with torch.cuda.device_of(u):
        error = getattr(_library(u.device.type), entry)(ctypes.byref(arguments))
    if error is not None:
        raise RuntimeError(f'mmvim_ops: {entry}: {error.decode()}')


def _stream(u: Tensor) -> int:
    return torch.cuda.current_stream(u.device).cuda_stream if u.is_cuda else 0


@lru_cache
def _limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a block may have."""
    limits = (c_int64 * 2)()
    error = _library(device.type).mmvim_device_limits(device.index or 0, limits)
    if error is not None:
        raise RuntimeError(f'mmvim_ops: {device}: {error.decode()}')
    return tuple(limits)


# What the registry calls; see mmvim_ops.backends.Backend.


def scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse):
    if A.shape[1] > MOST_STATES:
        return torch_scan.scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
    save = needs_gradient(u, delta, A, B, C, D, z, delta_bias)
    out, last_state, _ = torch.ops.mmvim_ops.cuda_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, save
    )
    return out, last_state


def bidirectional_scan(forward, backward, z, delta_softplus, scale):
    """None where the two directions do not fit into one launch."""
    states = max(forward.A.shape[1], backward.A.shape[1])
    if states > MOST_STATES:
        return None
    groups = math.lcm(_groups(forward.B, forward.C), _groups(backward.B, backward.C))
    if forward.u.shape[1] % groups:
        return None
    forward, backward = (_widen(direction, states, groups) for direction in (forward, backward))
    save = needs_gradient(*forward, *backward, z)
    return torch.ops.mmvim_ops.cuda_bidirectional_scan(
        *forward, *backward, z, delta_softplus, scale, save
    )[0]


def conv1d(x, weight, bias, silu, reverse):
    if weight.shape[1] > MOST_TAPS:
        return torch_conv.conv1d(x, weight, bias, silu, reverse)
    return torch.ops.mmvim_ops.cuda_conv1d(x, weight, bias, silu, reverse)


def _groups(*matrices: Tensor) -> int:
    return max(m.shape[1] if m.ndim == 4 else 1 for m in matrices)


def _widen(direction, states: int, groups: int):
    """The same scan with as many states and groups as the other direction has."""

    def matrix(m: Tensor) -> Tensor:
        missing = states - direction.A.shape[1]
        if m.ndim == 2:
            return F.pad(m, (0, missing)) if missing else m
        m = F.pad(m, (0, 0, 0, missing)) if missing else m
        if groups == 1 or (m.ndim == 4 and m.shape[1] == groups):
            return m
        return (m.unsqueeze(1) if m.ndim == 3 else m).repeat_interleave(
            groups // (m.shape[1] if m.ndim == 4 else 1), dim=1
        )

    A = F.pad(direction.A, (0, states - direction.A.shape[1]))
    return direction._replace(A=A, B=matrix(direction.B), C=matrix(direction.C))


class Arguments:
    """Tensors of one direction in the dtype that the kernels read, and their gradients."""

    def __init__(self, u, delta, A, B, C, D, delta_bias, reverse: bool, dtype: torch.dtype):
        self.given = (u, delta, A, B, C, D, delta_bias)
        self.reverse = reverse
        self.u, self.delta, self.B, self.C = (x.to(dtype) for x in (u, delta, B, C))
        self.A, self.D, self.delta_bias = (
            None if x is None else x.float().contiguous() for x in (A, D, delta_bias)
        )

    def side(self, **more) -> Side:
        return Side(
            reverse=self.reverse,
            **{name: _sequence(getattr(self, name)) for name in ('u', 'delta')},
            **{name: _matrix(getattr(self, name)) for name in 'BC'},
            **{name: _address(getattr(self, name)) for name in ('A', 'D', 'delta_bias')},
            **more,
        )


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _sequence(x: Tensor | None) -> Sequence:
    return Sequence() if x is None else Sequence(x.data_ptr(), *x.stride())


def _matrix(m: Tensor) -> Matrix:
    if m.ndim == 2:
        return Matrix(m.data_ptr(), False, 0, 0, m.stride(0), m.stride(1), 0)
    batch, *group, state, time = m.stride()
    return Matrix(m.data_ptr(), True, batch, group[0] if group else 0, 0, state, time)


def kernel_dtype(z: Tensor | None, *directions) -> torch.dtype:
    """What sequences and matrices are read as: their own dtype where they share one and there are
    kernels for it, else float32."""
    dtypes, matrices = set() if z is None else {z.dtype}, []
    for u, delta, A, B, C, *_ in directions:
        dtypes |= {x.dtype for x in (u, delta, B, C)}
        matrices += [B, C]
    plain = A.shape[1] <= FEW_STATES and all(m.ndim > 2 for m in matrices)
    return dtypes.pop() if plain and len(dtypes) == 1 else torch.float32


def count_chunks(warps: int, schedulers: int, length: int) -> int:
    """Into how many chunks that run side by side the length is cut.

    One chunk needs one pass. More of them need a second one, and pay where there are too few warps
    to keep the GPU's schedulers busy.
    """
    busy = warps / (WARPS * schedulers)
    most = max(1, length // SHORTEST_CHUNK)
    chunks = min(most, math.ceil(1 / busy))
    return chunks if SECOND_PASS / min(1, chunks * busy) < 1 / min(1, busy) else 1


class Plan:
    """How a scan is cut into blocks; fills what all of its kernels are given."""

    def __init__(self, sides: list[Arguments], z: Tensor | None, softplus: bool, scale: float):
        first = sides[0]
        self.u, self.sides, self.z = first.u, sides, z
        self.device, self.dtype = first.u.device, first.u.dtype
        self.batch, self.channels, self.length = first.u.shape
        self.states = first.A.shape[1]
        self.groups = _groups(first.B, first.C)
        self.library = _library(self.device.type)
        processors, self.shared_bytes = _limits(self.device)
        self.per_warp = self.library.mmvim_channels_per_warp(self.states)
        per_group = self.channels // self.groups
        warps = len(sides) * self.batch * self.groups * -(-per_group // self.per_warp)
        chunks = count_chunks(warps, 4 * processors, self.length)
        self.chunk_length = -(-self.length // (chunks * SEGMENT)) * SEGMENT
        self.chunks = -(-self.length // self.chunk_length)
        self.segments = -(-self.length // SEGMENT)
        self.processors, self.per_group = processors, per_group
        self.softplus, self.scale = softplus, scale

    def blocks(self, warps: int) -> int:
        """Blocks that share the channels of a group."""
        return -(-self.per_group // (warps * self.per_warp))

    def warps(self, backward: bool) -> int:
        """Of a block, per direction: many share what is read of B and C, few spread evenly."""
        for warps in (2,) if len(self.sides) == 2 else (4, 2):
            bytes_needed = self.library.mmvim_shared_bytes(
                self.states, warps, len(self.sides), backward
            )
            blocks = self.batch * self.chunks * self.groups * self.blocks(warps)
            fits = bytes_needed <= self.shared_bytes and self.blocks(warps // 2) > 1
            if fits and blocks >= 2 * self.processors:
                return warps
        return 1

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def run(self, entry: str, sides: list[Side], backward: bool, splits: int = 1, **more) -> None:
        between = {}
        if self.chunks > 1:
            rows = (len(sides), self.batch, self.chunks)
            between['ends'] = self.empty(*rows, self.states, self.channels)
            between['sums'] = self.empty(*rows, self.channels)
        _call(
            entry,
            self.u,
            Scan(
                dtype=DTYPES[self.dtype],
                device=self.device.index or 0,
                stream=_stream(self.u),
                batch=self.batch,
                channels=self.channels,
                length=self.length,
                states=self.states,
                groups=self.groups,
                directions=len(sides),
                softplus=self.softplus,
                chunks=self.chunks,
                chunk_length=self.chunk_length,
                warps=self.warps(backward),
                splits=splits,
                scale=self.scale,
                z=_sequence(self.z),
                side=(Side * 2)(*sides),
                **{name: x.data_ptr() for name, x in between.items()},
                **{name: _sequence(x) for name, x in more.items()},
            ),
        )

    def partial(self, like: Tensor | None) -> Tensor | None:
        """What one direction leaves for the other: the result itself where it is float32."""
        if like is None or len(self.sides) == 1:
            return None
        return like if like.dtype == torch.float32 else torch.empty_like(like, dtype=torch.float32)

    def forward(self, out: Tensor, checkpoints: list, last_state: Tensor | None = None) -> None:
        sides = [
            side.side(checkpoints=_address(saved), last_state=_address(last_state))
            for side, saved in zip(self.sides, checkpoints, strict=True)
        ]
        self.run('mmvim_scan_forward', sides, False, out=out, partial=self.partial(out))

    def backward(self, grad_out, grad_last_state, checkpoints: list) -> tuple[list, Tensor | None]:
        """Gradients of u, delta, A, B, C, D, delta_bias for each direction, and that of z."""
        warps = self.warps(True)
        # Sums over channels get a row per split: together at most twice the size of u.
        splits = min(self.blocks(warps), max(1, self.per_group // self.states))
        sides, buffers = [], []
        for side, saved in zip(self.sides, checkpoints, strict=True):
            rows = {'A': side.A, 'D': side.D, 'delta_bias': side.delta_bias}
            sums = {
                name: self.empty(self.batch, self.chunks, *reversed(x.shape))
                for name, x in rows.items()
                if x is not None
            }
            for name in 'BC':
                if getattr(side, name).ndim == 2:
                    shape = (self.batch, self.chunks, self.states, self.channels)
                else:
                    shape = (self.batch, self.groups, splits, self.length, self.states)
                sums[name] = self.empty(*shape)
            direct = {f'grad_{n}': torch.empty_like(getattr(side, n)) for n in ('u', 'delta')}
            sides.append(
                side.side(
                    checkpoints=_address(saved),
                    grad_last_state=_address(grad_last_state),
                    **{f'grad_{name}': x.data_ptr() for name, x in sums.items()},
                    **{name: _sequence(x) for name, x in direct.items()},
                )
            )
            buffers.append((*direct.values(), sums))
        grad_z = None if self.z is None else torch.empty_like(self.z)
        self.run(
            'mmvim_scan_backward',
            sides,
            True,
            splits,
            grad_out=grad_out,
            grad_z=grad_z,
            partial=self.partial(grad_z),
        )
        return [
            _add_up(side, *buffer) for side, buffer in zip(self.sides, buffers, strict=True)
        ], grad_z


def _add_up(side: Arguments, grad_u: Tensor, grad_delta: Tensor, sums: dict) -> list:
    """Gradients of a direction's arguments, None for those that were not given."""
    grads = [grad_u, grad_delta]
    for name, x in zip(('A', 'B', 'C', 'D', 'delta_bias'), side.given[2:], strict=True):
        if x is None:
            grads.append(None)
        elif x.ndim > 2:
            grad = sums[name].sum(2).mT  # (B, G, N, L)
            grads.append(grad.squeeze(1) if x.ndim == 3 else grad)
        else:
            total = sums[name].sum((0, 1))  # (N, D) or (D,)
            grads.append(total.mT.contiguous() if x.ndim == 2 else total)
    return grads


# The operators.


def _fake_checkpoints(u: Tensor, A: Tensor, save: bool) -> Tensor:
    batch, channels, length = u.shape
    segments = (length + SEGMENT - 1) // SEGMENT
    shape = (batch, segments, A.shape[1], channels) if save else (0,)
    return u.new_empty(shape, dtype=torch.float32)


def _cast(grad: Tensor | None, x: Tensor | None, u: Tensor) -> Tensor:
    """In the dtype of the argument; an empty one where it was not given."""
    return like(None, u) if x is None else grad.to(x.dtype)


@torch.library.custom_op(
    'mmvim_ops::cuda_scan',
    mutates_args=(),
    schema='(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, '
    'Tensor? delta_bias, bool delta_softplus, bool reverse, bool save) -> (Tensor, Tensor, Tensor)',
)
def _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, save):
    """Output, last state and, where ``save``, what backward needs besides the arguments."""
    out, last_state, checkpoints = _fake_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, save
    )
    if u.numel() == 0:
        return out, last_state.zero_(), checkpoints
    direction = (u, delta, A, B, C, D, delta_bias)
    dtype = kernel_dtype(z, direction)
    plan = Plan(
        [Arguments(*direction, reverse, dtype)],
        None if z is None else z.to(dtype),
        delta_softplus,
        1.0,
    )
    result = out if dtype == u.dtype else torch.empty_like(out, dtype=dtype)
    plan.forward(result, [checkpoints if save else None], last_state)
    return result.to(u.dtype), last_state, checkpoints


@_scan.register_fake
def _fake_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, save):
    last_state = u.new_empty(u.shape[0], u.shape[1], A.shape[1], dtype=torch.float32)
    return torch.empty_like(u), last_state, _fake_checkpoints(u, A, save)


@torch.library.custom_op(
    'mmvim_ops::cuda_scan_backward',
    mutates_args=(),
    schema='(Tensor grad_out, Tensor grad_last_state, Tensor u, Tensor delta, Tensor A, Tensor B, '
    'Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, Tensor checkpoints, bool delta_softplus, '
    'bool reverse) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)',
)
def _scan_backward(
    grad_out,
    grad_last_state,
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    checkpoints,
    delta_softplus,
    reverse,
):
    """Gradients of u, delta, A, B, C, D, z, delta_bias; empty ones of what was not given."""
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    if u.numel() == 0:
        grads = fake_scan_backward(None, None, *tensors, None, None, None)
        return tuple(grad.zero_() for grad in grads)
    direction = (u, delta, A, B, C, D, delta_bias)
    dtype = kernel_dtype(z, direction)
    plan = Plan(
        [Arguments(*direction, reverse, dtype)],
        None if z is None else z.to(dtype),
        delta_softplus,
        1.0,
    )
    (grads,), grad_z = plan.backward(
        grad_out.to(dtype), grad_last_state.float().contiguous(), [checkpoints]
    )
    grads.insert(6, grad_z)
    return tuple(_cast(grad, x, u) for grad, x in zip(grads, tensors, strict=True))


_DIRECTIONS = (
    'Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, '
    'Tensor u_b, Tensor delta_b, Tensor A_b, Tensor B_b, Tensor C_b, Tensor? D_b, '
    'Tensor? delta_bias_b, Tensor? z, '
)


@torch.library.custom_op(
    'mmvim_ops::cuda_bidirectional_scan',
    mutates_args=(),
    schema=f'({_DIRECTIONS}bool delta_softplus, float scale, bool save) '
    '-> (Tensor, Tensor, Tensor)',
)
def _bidirectional_scan(*arguments):
    """Output and, where ``save``, what backward needs besides the arguments."""
    u, save = arguments[0], arguments[-1]
    out, *checkpoints = _fake_bidirectional_scan(*arguments)
    if u.numel() == 0:
        return out, *checkpoints
    plan = _two_directions(*arguments[:-1])
    result = out if plan.dtype == u.dtype else torch.empty_like(out, dtype=plan.dtype)
    plan.forward(result, checkpoints if save else [None, None])
    return result.to(u.dtype), *checkpoints


def _two_directions(*arguments) -> Plan:
    *tensors, z, delta_softplus, scale = arguments
    directions = (tensors[:7], tensors[7:])
    dtype = kernel_dtype(z, *directions)
    sides = [Arguments(*directions[i], bool(i), dtype) for i in range(2)]
    return Plan(sides, None if z is None else z.to(dtype), delta_softplus, scale)


@_bidirectional_scan.register_fake
def _fake_bidirectional_scan(*arguments):
    u, A, A_b, save = arguments[0], arguments[2], arguments[9], arguments[-1]
    return torch.empty_like(u), _fake_checkpoints(u, A, save), _fake_checkpoints(u, A_b, save)


@torch.library.custom_op(
    'mmvim_ops::cuda_bidirectional_scan_backward',
    mutates_args=(),
    schema=f'(Tensor grad_out, {_DIRECTIONS}Tensor checkpoints, Tensor checkpoints_b, '
    'bool delta_softplus, float scale) -> Tensor[]',
)
def _bidirectional_scan_backward(grad_out, *arguments):
    """Gradients of both directions' tensors and of z; empty ones of what was not given."""
    *tensors, checkpoints, checkpoints_b, delta_softplus, scale = arguments
    u = tensors[0]
    if u.numel() == 0:
        grads = fake_bidirectional_scan_backward(grad_out, *arguments)
        return [grad.zero_() for grad in grads]
    plan = _two_directions(*tensors, delta_softplus, scale)
    grads, grad_z = plan.backward(grad_out.to(plan.dtype), None, [checkpoints, checkpoints_b])
    grads = [*grads[0], *grads[1], grad_z]
    return [_cast(grad, x, u) for grad, x in zip(grads, tensors, strict=True)]


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, silu, reverse) -> dict:
    return dict(
        dtype=DTYPES[x.dtype],
        device=x.device.index or 0,
        stream=_stream(x),
        batch=x.shape[0],
        channels=x.shape[1],
        length=x.shape[2],
        taps=weight.shape[1],
        silu=silu,
        reverse=reverse,
        x=_sequence(x),
        weight=weight.data_ptr(),
        bias=_address(bias),
    )


def _packed(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


@torch.library.custom_op(
    'mmvim_ops::cuda_conv1d',
    mutates_args=(),
    schema='(Tensor x, Tensor weight, Tensor? bias, bool silu, bool reverse) -> Tensor',
)
def _conv1d(x, weight, bias, silu, reverse):
    out, weight, bias = torch.empty_like(x), _packed(weight), _packed(bias)
    if x.numel() > 0:
        arguments = _convolution(x, weight, bias, silu, reverse)
        _call('mmvim_conv_forward', x, Convolution(**arguments, out=_sequence(out)))
    return out


@torch.library.custom_op(
    'mmvim_ops::cuda_conv1d_backward',
    mutates_args=(),
    schema='(Tensor grad_out, Tensor x, Tensor weight, Tensor? bias, bool silu, bool reverse) '
    '-> (Tensor, Tensor, Tensor)',
)
def _conv1d_backward(grad_out, x, weight, bias, silu, reverse):
    """Gradients of x, weight, bias; an empty one of what was not given."""
    grad_x, packed, packed_bias = torch.empty_like(x), _packed(weight), _packed(bias)
    tiles = -(-x.shape[2] // CONV_STEPS)
    shape = (x.shape[0], tiles, x.shape[1], weight.shape[1] + 1)
    sums = torch.empty(shape, dtype=torch.float32, device=x.device)
    if x.numel() > 0:
        grad_out = grad_out.to(x.dtype)
        arguments = _convolution(x, packed, packed_bias, silu, reverse)
        arguments |= dict(grad_out=_sequence(grad_out), grad_x=_sequence(grad_x))
        _call('mmvim_conv_backward', x, Convolution(**arguments, grad_parameters=sums.data_ptr()))
    sums = sums.sum((0, 1))  # (D, taps + 1)
    grad_weight = sums[:, :-1].to(weight.dtype, copy=True, memory_format=torch.contiguous_format)
    return grad_x, grad_weight, _cast(sums[:, -1].contiguous(), bias, x)


_conv1d.register_fake(fake_conv1d)
for backward, fake in (
    (_scan_backward, fake_scan_backward),
    (_bidirectional_scan_backward, fake_bidirectional_scan_backward),
    (_conv1d_backward, fake_conv1d_backward),
):
    backward.register_fake(fake)
register_gradients('cuda')
