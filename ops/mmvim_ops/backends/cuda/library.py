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

LIBRARY = Path(__file__).parents[2] / '_cuda.so'
BUILD_COMMAND = 'python ops/build_cuda.py'
DTYPES = {getattr(torch, name): number for name, number in structures.DTYPES.items()}

CONSTANTS: dict[str, int] = {}  # of the library: most_states, conv_steps, most_taps


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
        names = ('most_states', 'conv_steps', 'most_taps')
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


def call(function: str, device: torch.device, *arguments) -> None:
    run = getattr(library(device.type), function)
    if device.type != 'cuda' or device.index == torch.cuda.current_device():
        error = run(*arguments)
    else:
        with torch.cuda.device(device):
            error = run(*arguments)
    if error is not None:
        raise RuntimeError(f'mmvim_ops: {function}: {error.decode()}')


def stream(device: torch.device) -> int:
    if device.type != 'cuda':
        return 0
    return torch._C._cuda_getCurrentRawStream(device.index)  # without an object around it


@lru_cache
def limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a block may have."""
    found = (c_int64 * 2)()
    error = library(device.type).mmvim_device_limits(device.index or 0, found)
    if error is not None:
        raise RuntimeError(f'mmvim_ops: {device}: {error.decode()}')
    return tuple(found)


def memory(floats: int, device: torch.device) -> Tensor:
    """Where kernels leave what no caller sees."""
    return torch.empty(floats, dtype=torch.float32, device=device)


def cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return x if x is None or x.dtype is dtype else x.to(dtype)


def packed(x: Tensor | None) -> Tensor | None:
    """As kernels read parameters: float32, contiguous."""
    if x is None or (x.dtype is torch.float32 and x.is_contiguous()):
        return x
    return x.float().contiguous()


# Values for structures.filled.


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def sequence(x: Tensor | None) -> tuple[int, ...]:
    return structures.NO_SEQUENCE if x is None else (x.data_ptr(), *x.stride())


def matrix(m: Tensor) -> tuple[int, ...]:
    if m.ndim == 2:
        return m.data_ptr(), 0, 0, 0, *m.stride(), 0
    if m.ndim == 3:
        batch, state, time = m.stride()
        return m.data_ptr(), 1, batch, 0, 0, state, time
    batch, group, state, time = m.stride()
    return m.data_ptr(), 1, batch, group, 0, state, time


def gradient(x: Tensor | None, given: Tensor | None) -> tuple[int, int]:
    """Where the gradient of an argument goes to, if the argument was given."""
    return structures.NO_GRADIENT if given is None else (x.data_ptr(), DTYPES[x.dtype])
