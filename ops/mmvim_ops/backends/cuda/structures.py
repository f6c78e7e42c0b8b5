"""The structures of ``csrc/cuda/args.h``, as ctypes passes them.

The build loads this file, too: the library is compiled only if every structure, field and type here
is that of the C++ source (:func:`header`), and carries :func:`interface`. It must not import torch.
"""

import ctypes
import hashlib
import struct
from ctypes import POINTER, c_char_p, c_double, c_int64, c_void_p
from functools import lru_cache


class Sequence(ctypes.Structure):
    _fields_ = [('data', c_void_p), *((name, c_int64) for name in ('batch', 'channel', 'time'))]


class Matrix(ctypes.Structure):
    _fields_ = [
        ('data', c_void_p),
        *((name, c_int64) for name in ('varying', 'batch', 'group', 'channel', 'state', 'time')),
    ]


class Direction(ctypes.Structure):
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
                *('directions', 'softplus', 'chunks', 'chunk_length', 'warps', 'lanes', 'splits'),
            )
        ),
        ('scale', c_double),
        *((name, Sequence) for name in ('z', 'out', 'partial', 'grad_out', 'grad_z')),
        ('ends', c_void_p),
        ('sums', c_void_p),
        ('direction', Direction * 2),
    ]


class Gradient(ctypes.Structure):
    _fields_ = [('data', c_void_p), ('dtype', c_int64)]


class Totals(ctypes.Structure):
    _fields_ = [(name, Gradient) for name in ('B', 'C', 'A', 'D', 'delta_bias')]


class SecondFilter(ctypes.Structure):
    _fields_ = [
        ('reverse', c_int64),
        ('out', Sequence),
        ('weight', c_void_p),
        ('bias', c_void_p),
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
        ('partial', c_void_p),
        ('grad_weight', Gradient),
        ('grad_bias', Gradient),
        ('second', SecondFilter),
    ]


STRUCTURES = (Sequence, Matrix, Direction, Scan, Gradient, Totals, SecondFilter, Convolution)
# Result and arguments of the library's functions. A string says what is wrong, null nothing.
FUNCTIONS = {
    'mmvim_scan_forward': (c_char_p, POINTER(Scan)),
    'mmvim_scan_backward': (c_char_p, POINTER(Scan)),
    'mmvim_scan_finish': (c_char_p, POINTER(Scan), POINTER(Totals)),
    'mmvim_conv_forward': (c_char_p, POINTER(Convolution)),
    'mmvim_conv_backward': (c_char_p, POINTER(Convolution)),
    'mmvim_device_limits': (c_char_p, c_int64, POINTER(c_int64)),
    'mmvim_most_threads': (c_int64, c_int64, c_int64, c_int64),
    'mmvim_shared_bytes': (c_int64, c_int64, c_int64, c_int64, c_int64, c_int64),
}
# What stands for a structure that was not given.
NO_SEQUENCE = (0,) * 4
NO_DIRECTION = (0,) * (ctypes.sizeof(Direction) // 8)
NO_GRADIENT = (0,) * 2
NO_SECOND = (0,) * 7  # filter of a convolution
DTYPES = {'float32': 0, 'float16': 1, 'bfloat16': 2}  # Dtype of csrc/cuda/device.h
SEGMENT = 64  # kSegment of csrc/cuda/args.h: steps between two checkpoints


def filled(structure, values):
    """A structure, or an array of them, with these values: one for each eight bytes, in their
    order. To set fields one by one takes ten times as long."""
    return structure.from_buffer_copy(_packer(structure).pack(*values))


@lru_cache
def _packer(structure) -> struct.Struct:
    return struct.Struct(_format(structure))


def _format(kind) -> str:
    """As module ``struct`` writes it."""
    if issubclass(kind, ctypes.Array):
        return _format(kind._type_) * kind._length_
    if issubclass(kind, ctypes.Structure):
        return ''.join(_format(field[1]) for field in kind._fields_)
    return 'd' if kind is c_double else 'q'


def interface() -> str:
    """Changes whenever a structure, a function or a dtype's number does."""
    return hashlib.sha256('\n'.join([*_conditions(), repr(_functions())]).encode()).hexdigest()[:16]


def header() -> str:
    """C++ that compiles only where the sources have the same structures, and names the interface
    for them."""
    lines = [f'static_assert({condition}, "");' for condition in _conditions()]
    return '\n'.join([f'#define MMVIM_INTERFACE "{interface()}"', *lines, ''])


def _functions() -> dict:
    return {name: [kind.__name__ for kind in kinds] for name, kinds in FUNCTIONS.items()}


def _conditions() -> list[str]:
    """What must hold in C++."""
    found = [f'mmvim::k{name.capitalize()} == {number}' for name, number in DTYPES.items()]
    found.append(f'mmvim::kSegment == {SEGMENT}')
    for structure in STRUCTURES:
        ours = f'mmvim::{structure.__name__}'
        found.append(f'sizeof({ours}) == {ctypes.sizeof(structure)}')
        for name, kind in structure._fields_:
            found.append(f'offsetof({ours}, {name}) == {getattr(structure, name).offset}')
            found.append(_has_type(f'decltype({ours}::{name})', kind))
    return found


def _has_type(cpp: str, kind) -> str:
    if kind is c_void_p:
        return f'std::is_pointer_v<{cpp}>'
    if kind in (c_int64, c_double):
        return f'std::is_same_v<{cpp}, {"int64_t" if kind is c_int64 else "double"}>'
    if issubclass(kind, ctypes.Array):
        return f'std::is_same_v<{cpp}, mmvim::{kind._type_.__name__}[{kind._length_}]>'
    return f'std::is_same_v<{cpp}, mmvim::{kind.__name__}>'
