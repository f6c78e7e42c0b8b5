"""The compiled kernels of ``csrc/cuda``: where they are and how they are called.

There is neither torch nor Python in the library: ctypes passes it addresses, strides and a stream,
so that one build serves every version of both.
"""

import ctypes
from ctypes import c_int64
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from .. import compiled
from . import structures
from .structures import Matrix, Sequence

LIBRARY = Path(__file__).parents[2] / '_cuda.so'
BUILD_COMMAND = 'python ops/build_cuda.py'
DTYPES = {getattr(torch, name): number for name, number in structures.DTYPES.items()}

CONSTANTS: dict[str, int] = {}  # of the library: segment, most_states, conv_steps, most_taps


def _load(path: Path) -> ctypes.CDLL | str:
    """The library, or what is wrong with it."""
    reason = compiled.why_not(path, structures.interface(), BUILD_COMMAND)
    if reason is not None:
        return reason
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, *arguments) in structures.FUNCTIONS.items():
            getattr(library, name).argtypes = arguments
            getattr(library, name).restype = result
        names = ('segment', 'most_states', 'conv_steps', 'most_taps')
        CONSTANTS.update(compiled.constants(library.mmvim_constant, names))
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


def constant(name: str) -> int:
    if name not in CONSTANTS:
        raise RuntimeError(f"mmvim_ops: backend 'cuda' is missing: {missing()}")
    return CONSTANTS[name]


def library(device_type: str) -> ctypes.CDLL:
    found = _compiled if device_type == 'cuda' else _emulated
    if not isinstance(found, ctypes.CDLL):
        raise RuntimeError(f'mmvim_ops: no kernels for {device_type}: {found}')
    return found


def call(function: str, u: Tensor, arguments) -> None:
    with torch.cuda.device_of(u):
        error = getattr(library(u.device.type), function)(ctypes.byref(arguments))
    if error is not None:
        raise RuntimeError(f'mmvim_ops: {function}: {error.decode()}')


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
