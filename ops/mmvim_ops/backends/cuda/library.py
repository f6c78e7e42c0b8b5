"""The compiled kernels of ``csrc/cuda``: their structures, where they are, how they are called.

There is neither torch nor Python in the library: ctypes passes it addresses, strides and a stream,
so that one build serves every version of both.
"""

import ctypes
from ctypes import c_double, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = Path(__file__).parents[2] / '_cuda.so'
BUILD_COMMAND = 'python ops/build_cuda.py'
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # Dtype of csrc/cuda/device.h


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
_emulated = None


def emulate(path: Path) -> None:
    """For tests: take the same kernels, compiled for the CPU, where tensors are on the CPU."""
    global _emulated
    _emulated = _load(path)
    if isinstance(_emulated, str):
        raise RuntimeError(f'{path}: {_emulated}')


def missing() -> str | None:
    """Why the backend cannot run on this machine; None where it can."""
    if _emulated is not None:
        return None
    if isinstance(_compiled, str):
        return _compiled
    return None if torch.cuda.is_available() else 'there is no CUDA device'


def library(device_type: str) -> ctypes.CDLL:
    found = _compiled if device_type == 'cuda' else _emulated
    if not isinstance(found, ctypes.CDLL):
        raise RuntimeError(f'mmvim_ops: no kernels for {device_type}: {found}')
    return found


def call(entry: str, u: Tensor, arguments) -> None:
    with torch.cuda.device_of(u):
        error = getattr(library(u.device.type), entry)(ctypes.byref(arguments))
    if error is not None:
        raise RuntimeError(f'mmvim_ops: {entry}: {error.decode()}')


def stream(u: Tensor) -> int:
    return torch.cuda.current_stream(u.device).cuda_stream if u.is_cuda else 0


@lru_cache
def limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a block may have."""
    found = (c_int64 * 2)()
    error = library(device.type).mmvim_device_limits(device.index or 0, found)
    if error is not None:
        raise RuntimeError(f'mmvim_ops: {device}: {error.decode()}')
    return tuple(found)


def address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def sequence(x: Tensor | None) -> Sequence:
    return Sequence() if x is None else Sequence(x.data_ptr(), *x.stride())


def matrix(m: Tensor) -> Matrix:
    if m.ndim == 2:
        return Matrix(m.data_ptr(), False, 0, 0, m.stride(0), m.stride(1), 0)
    batch, *group, state, time = m.stride()
    return Matrix(m.data_ptr(), True, batch, group[0] if group else 0, 0, state, time)
