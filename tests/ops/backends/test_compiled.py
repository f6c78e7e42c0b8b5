"""A compiled library is loaded only where it was made for the Python code beside it."""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from build_emulation import KERNELS, find_compiler

from mmvim_ops.backends import compiled, schemas
from mmvim_ops.backends.cpp import library as cpp
from mmvim_ops.backends.cuda import library as cuda
from mmvim_ops.backends.cuda import structures

sys.path.insert(0, str(Path(__file__).parents[3] / 'ops'))
import build_interface

LIBRARIES = {cpp: schemas.library_interface(torch.__version__), cuda: structures.interface()}
each_library = pytest.mark.parametrize('module', LIBRARIES, ids=['cpp', 'cuda'])


def swapped(structure, first, second):
    """The same structure with two fields in each other's place."""
    order = {first: second, second: first}
    kinds = dict(structure._fields_)
    fields = [(order.get(name, name), kinds[order.get(name, name)]) for name in kinds]
    return type(structure.__name__, (ctypes.Structure,), {'_fields_': fields})


@each_library
def test_a_library_that_is_not_there_says_how_to_make_it(module, tmp_path):
    assert f'run: {module.BUILD_COMMAND}' in module._load(tmp_path / 'no.so')


@each_library
@pytest.mark.parametrize('content', [b'', b'no library', compiled.MARK + b'0123456789abcdef\0'])
def test_a_library_of_another_interface_is_not_loaded(module, content, tmp_path, monkeypatch):
    monkeypatch.setattr(ctypes, 'CDLL', None)
    file = tmp_path / 'other.so'
    file.write_bytes(content)
    assert 'compiled for another version' in module._load(file)


@each_library
def test_a_broken_library_of_the_right_interface_does_not_load(module, tmp_path):
    file = tmp_path / 'broken.so'
    file.write_bytes(compiled.MARK + LIBRARIES[module].encode() + b'\0')
    assert compiled.interface_of(file) == LIBRARIES[module]
    assert 'does not load' in module._load(file)


@pytest.mark.skipif(cpp.MISSING is not None, reason='the cpp backend is not compiled')
def test_the_library_in_use_carries_the_interface():
    assert compiled.interface_of(cpp.LIBRARY) == schemas.library_interface(torch.__version__)
    assert cpp.CONSTANTS['segment'] > 0
    with pytest.raises(AttributeError, match='it has no constant age'):
        compiled.constants(ctypes.CDLL(str(cpp.LIBRARY)).mmvim_cpp_constant, ('segment', 'age'))


def test_a_changed_schema_is_another_interface(monkeypatch):
    before = schemas.interface()
    schema = schemas.SCHEMAS['conv1d'].replace('bool silu, bool reverse', 'bool reverse, bool silu')
    monkeypatch.setitem(schemas.SCHEMAS, 'conv1d', schema)
    assert schemas.interface() != before


CHANGES = {
    'two fields swapped': swapped(structures.Scan, 'chunks', 'splits'),
    'two pointers swapped': swapped(structures.Scan, 'ends', 'sums'),
    'another type': type(
        'Sequence', (ctypes.Structure,), {'_fields_': [('data', ctypes.c_int64)] * 1}
    ),
}


@pytest.mark.parametrize('change', CHANGES)
def test_a_changed_structure_is_another_interface(change, monkeypatch):
    before = structures.interface()
    monkeypatch.setattr(structures, 'STRUCTURES', (CHANGES[change],))
    one = structures.interface()
    name = CHANGES[change].__name__
    monkeypatch.setattr(structures, 'STRUCTURES', (getattr(structures, name),))
    assert len({before, one, structures.interface()}) == 3


def test_a_changed_number_of_a_dtype_is_another_interface(monkeypatch):
    before = structures.interface()
    monkeypatch.setitem(structures.DTYPES, 'float16', 2)
    assert structures.interface() != before


@pytest.mark.skipif(find_compiler() is None, reason='there is no C++ compiler')
@pytest.mark.parametrize('change', [None, *CHANGES])
def test_the_sources_compile_only_with_the_structures_of_python(change, monkeypatch, tmp_path):
    if change is not None:
        monkeypatch.setattr(structures, 'STRUCTURES', (CHANGES[change],))
    (tmp_path / 'mmvim_interface.h').write_text(structures.header())
    source = """
        #include <cstddef>
        #include <type_traits>
        #include "args.h"
        namespace mmvim { enum Dtype { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 }; }
        #include "mmvim_interface.h"
    """
    command = [find_compiler(), '-std=c++17', '-fsyntax-only', f'-I{KERNELS}', f'-I{tmp_path}']
    result = subprocess.run(
        [*command, '-x', 'c++', '-'], input=source, capture_output=True, text=True
    )
    assert (result.returncode == 0) == (change is None), result.stderr
    assert change is None or 'static assertion failed' in result.stderr


@pytest.mark.skipif(cpp.MISSING is not None, reason='the cpp backend is not compiled')
def test_the_library_defines_the_operators_that_the_schemas_name():
    for name, schema in schemas.SCHEMAS.items():
        operator = getattr(torch.ops.mmvim_ops, f'cpp_{name}').default
        assert str(operator._schema) == str(torch._C.parse_schema(f'mmvim_ops::cpp_{name}{schema}'))
        assert torch.Tag.pt2_compliant_tag in operator.tags


@pytest.mark.skipif(cpp.MISSING is not None, reason='the cpp backend is not compiled')
def test_the_library_alone_defines_the_operators():
    """As in a program without Python."""
    code = (
        'import ctypes, torch\n'
        f'ctypes.CDLL({str(cpp.LIBRARY)!r})\n'
        'x = torch.randn(2, 8, 30)\n'
        'y = torch.ops.mmvim_ops.cpp_conv1d(x, torch.randn(8, 4), None, True, False)\n'
        'print(y.shape)'
    )
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == 'torch.Size([2, 8, 30])'


def test_the_build_reads_the_same_interface_without_torch(tmp_path):
    ops = Path(build_interface.__file__).parent
    shutil.copy(ops / 'build_interface.py', tmp_path)
    (tmp_path / 'mmvim_ops').symlink_to(ops / 'mmvim_ops')
    code = (
        'import sys; sys.modules["torch"] = None; import build_interface as b; '
        'print(b.cpp_flag("2.13.0+cpu"))'
    )
    output = subprocess.run(
        [sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert output.strip() == f'-DMMVIM_INTERFACE="{schemas.interface()} torch 2.13"'
    build_interface.write_cpp_header(tmp_path)
    assert (tmp_path / 'mmvim_schemas.h').read_text() == schemas.cpp_header()
    build_interface.write_cuda_header(tmp_path)
    assert (tmp_path / 'mmvim_interface.h').read_text() == structures.header()
