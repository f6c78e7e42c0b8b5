"""Readers that stand in for the types of mmengine's and the official training checkpoints.

``torch.load(weights_only=True)`` builds tensors, plain containers, and what is on an allow-list.
mmengine's own checkpoints also hold numpy values and ``HistoryBuffer``, whose pickle refers to its
methods through ``getattr``; the official training script adds an ``argparse.Namespace``. None of
these may be on the list itself. ``getattr`` reaches every function of Python, a ``HistoryBuffer``
takes any attributes, and the state of a ``numpy.dtype`` may say that plain bytes are pointers to
objects.

The list therefore holds the functions and classes of this module, each under the name of the type
that it reads. They take exactly what such a type writes of itself, numbers and strings, and raise
:class:`pickle.UnpicklingError` at anything else.
"""

from __future__ import annotations

import math
import re
from argparse import Namespace
from collections.abc import Callable
from pickle import UnpicklingError

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

__all__ = ['allow_mmengine_checkpoints']

STATISTICS = ('min', 'max', 'mean', 'current')


def allow_mmengine_checkpoints() -> None:
    """Let torch read mmengine's own training checkpoints without running anything in them.

    Puts this module's readers on torch's allow-list; the types that they read are not on it.
    """
    torch.serialization.add_safe_globals(READERS)


def _reads(name: str) -> Callable:
    """Decorator: let the pickled ``name`` mean this function or class.

    torch knows what is on its list by ``__module__`` and ``__name__`` (by ``__qualname__`` since
    2.5). Pairs of a reader and a name would say the same, from torch 2.6 on.
    """

    def rename(reader):
        reader.__module__, reader.__name__ = name.rsplit('.', 1)
        reader.__qualname__ = reader.__name__
        return reader

    return rename


def _refuse(name: str, what: str) -> UnpicklingError:
    return UnpicklingError(f'GLOBAL {name} was refused: {what}')


# numpy ------------------------------------------------------------------------------------------


@_reads('numpy.dtype')
class DTypeReader:
    """The dtype of numbers or of strings of fixed length that arrays and scalars refer to."""

    def __init__(self, kind: str, align: bool = False, copy: bool = True) -> None:
        if type(kind) is not str or not re.fullmatch('[biufcSU][1-9][0-9]{0,5}', kind):
            raise _refuse('numpy.dtype', f'{kind!r} is no type of numbers')
        try:
            self.dtype = np.dtype(kind)
        except TypeError as error:
            raise _refuse('numpy.dtype', str(error)) from None

    def __setstate__(self, state: tuple) -> None:
        # The state ends with flags, one of which would make numpy take bytes for pointers. All
        # but the byte order follows from the kind, so that no more is taken from the file.
        order, flags = state[1::6] if type(state) is tuple and len(state) == 8 else (None, None)
        if order not in ('<', '>', '|') or flags not in (0, 8):
            raise _refuse('numpy.dtype', f'the state {state} is none of a type of numbers')
        self.dtype = self.dtype.newbyteorder(order)


@_reads('numpy.ndarray')
class ArrayReader(np.ndarray):
    """An array of numbers; it is written as a plain array again."""

    def __new__(cls, *args, **kwargs):
        raise _refuse('numpy.ndarray', 'an array is not built by calling its class')

    def __setstate__(self, state: tuple) -> None:
        if type(state) is not tuple or list(map(type, state)) != ARRAY_STATE:
            raise _refuse('numpy.ndarray', 'its state is none of an array of numbers')
        version, shape, reader, fortran, content = state
        if any(type(side) is not int or side < 0 for side in shape):
            raise _refuse('numpy.ndarray', f'{shape} is no shape')
        if math.prod(shape) * reader.dtype.itemsize != len(content):
            raise _refuse('numpy.ndarray', f'{len(content)} bytes are no {shape} {reader.dtype}')
        super().__setstate__((version, shape, reader.dtype, fortran, content))

    def __reduce__(self):
        return self.view(np.ndarray).__reduce__()

    def __reduce_ex__(self, protocol: int):
        return self.view(np.ndarray).__reduce_ex__(protocol)


# The version, the shape, the dtype, whether columns come first, the numbers.
ARRAY_STATE = [int, tuple, DTypeReader, bool, bytes]


def _reconstruct(kind: type, shape: tuple, letter: bytes) -> ArrayReader:
    if kind is not ArrayReader:
        raise _refuse('numpy.ndarray', f'no array of the class {kind} is read')
    return np.ndarray.__new__(ArrayReader, 0)


def _scalar(reader: DTypeReader, content: bytes) -> np.generic:
    if type(reader) is not DTypeReader or type(content) is not bytes:
        raise _refuse('numpy.generic', 'it is no number')
    if len(content) != reader.dtype.itemsize:
        raise _refuse('numpy.generic', f'{len(content)} bytes are no {reader.dtype}')
    return np.frombuffer(content, reader.dtype)[0]


# mmengine ---------------------------------------------------------------------------------------


@_reads('mmengine.logging.history_buffer.HistoryBuffer')
class HistoryReader(HistoryBuffer):
    """A logged scalar; turns into a ``HistoryBuffer`` of two checked arrays."""

    def __new__(cls, *args):
        if args:
            raise _refuse('HistoryBuffer', 'it is not built by calling its class')
        return super().__new__(cls)

    def __init__(self) -> None:
        raise _refuse('HistoryBuffer', 'it is not built by calling its class')

    def __setstate__(self, state: dict) -> None:
        known = {'max_length', '_log_history', '_count_history', 'statistics_methods'}
        if type(state) is not dict or not set(state) <= known:
            raise _refuse('HistoryBuffer', 'its state has other entries than a history')
        arrays = [state.get(name) for name in ('_log_history', '_count_history')]
        if not all(isinstance(a, np.ndarray) and a.dtype.kind in 'biuf' for a in arrays):
            raise _refuse('HistoryBuffer', 'its history is no array of numbers')
        if arrays[0].ndim != 1 or arrays[0].shape != arrays[1].shape:
            raise _refuse('HistoryBuffer', 'its history and its counts are not of one length')
        if type(state.get('max_length')) is not int or state['max_length'] < 1:
            raise _refuse('HistoryBuffer', 'its max_length is no positive integer')
        self.__class__ = HistoryBuffer
        self.__init__(*map(np.array, arrays), state['max_length'])


def _encode(text: str, encoding: str) -> bytes:
    """What bytes are pickled as by protocol 2; torch reads it itself since 2.5."""
    if type(text) is not str or encoding != 'latin1':
        raise _refuse('_codecs.encode', f'bytes are pickled as latin1, not as {encoding!r}')
    return text.encode('latin1')


def _no_bytes() -> bytes:
    """What ``bytes`` is pickled for by protocol 2: the content of an empty array."""
    return b''


def _slice(*limits: int | None) -> slice:
    if not all(limit is None or type(limit) is int for limit in limits):
        raise _refuse('slice', 'its limits are no integers')
    return slice(*limits)


def _method(owner: type, name: str) -> str:
    """What ``getattr`` is pickled for: ``HistoryBuffer.mean`` and its like, read as a name."""
    if owner is not HistoryReader or name not in STATISTICS:
        raise _refuse('getattr', f'{name!r} of {owner!r} is no statistic of a HistoryBuffer')
    return name


# The official training script -------------------------------------------------------------------


@_reads('argparse.Namespace')
class NamespaceReader(Namespace):
    """Arguments of a command line; turns into a ``Namespace`` with nothing but these."""

    def __new__(cls, *args):
        if args:
            raise _refuse('argparse.Namespace', 'it is not built by calling its class')
        return super().__new__(cls)

    def __init__(self) -> None:
        raise _refuse('argparse.Namespace', 'it is not built by calling its class')

    def __setstate__(self, state: dict) -> None:
        if type(state) is not dict or not all(type(name) is str for name in state):
            raise _refuse('argparse.Namespace', 'its state is no dict of names')
        taken = [name for name in state if hasattr(Namespace, name)]
        if taken:
            raise _refuse('argparse.Namespace', f'{taken[0]!r} would replace a method')
        self.__dict__.update(state)
        self.__class__ = Namespace


def _under(names: tuple[str, ...], function: Callable) -> list[Callable]:
    """One reader of its own for each name."""
    return [_reads(name)(lambda *args: function(*args)) for name in names]


# numpy 2 renamed its core; Python 2's name of the builtins is that of pickle protocol 2.
CORES = ('numpy.core.multiarray', 'numpy._core.multiarray')
READERS = [
    *(DTypeReader, ArrayReader, HistoryReader, NamespaceReader),
    *_under(tuple(f'{core}._reconstruct' for core in CORES), _reconstruct),
    *_under(tuple(f'{core}.scalar' for core in CORES), _scalar),
    *_under(('builtins.getattr', '__builtin__.getattr'), _method),
    *_under(('_codecs.encode',), _encode),
    *_under(('builtins.bytes', '__builtin__.bytes'), _no_bytes),
    *_under(('builtins.slice', '__builtin__.slice'), _slice),
]
