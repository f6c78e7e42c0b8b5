"""How the compiled CPU backend is built: its flags, and its kernels, without torch.

``check_kernels.cpp`` compares the kernels of every instruction set that the processor has with
plain loops. It runs for Arm in an emulation of the processor.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

OPS = Path(__file__).resolve().parents[3] / 'ops'
sys.path.insert(0, str(OPS))
import build_cpp  # noqa: E402

CHECK = Path(__file__).resolve().parents[1] / 'cpu_kernels/check_kernels.cpp'
ARM_COMPILER, ARM_OBJDUMP = 'aarch64-linux-gnu-g++', 'aarch64-linux-gnu-objdump'


def need(*programs):
    """Paths of these programs, of the first of a tuple; skips where one is missing."""
    found = []
    for names in programs:
        names = (names,) if isinstance(names, str) else names
        found.append(next((path for name in names if (path := shutil.which(name))), None))
        if found[-1] is None:
            pytest.skip(f'needs {" or ".join(names)}')
    return found


def compile_check(compiler, machine, folder, *flags):
    """The program and the object files of its kernels."""
    includes = f'-I{build_cpp.SOURCES}'
    common = [compiler, '-std=c++17', *build_cpp.COMMON, '-Werror']
    objects = []
    for name, special in build_cpp.kernels(machine).items():
        objects.append(folder / f'{name}.o')
        command = [*common, *special, '-c', build_cpp.SOURCES / name, '-o', objects[-1]]
        subprocess.run(command, check=True)
    program = folder / 'check_kernels'
    sources = [CHECK, build_cpp.SOURCES / 'dispatch.cpp']
    command = [*common, '-Wall', '-Wextra', '-O1', *flags, includes]
    subprocess.run([*command, *sources, *objects, '-o', program], check=True)
    return program, objects


def lines_of(*command):
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize('compiler', ['g++', 'clang++'])
def test_kernels_of_every_instruction_set_agree_with_plain_loops(compiler, tmp_path):
    (compiler,) = need(compiler)
    program, _ = compile_check(compiler, build_cpp.platform.machine(), tmp_path)
    checked = {line.split(':')[0] for line in lines_of(program, '200')}
    assert {'portable float', 'portable double'} <= checked
    if 'avx2' in Path('/proc/cpuinfo').read_text():
        assert {'avx2 float', 'avx2 double'} <= checked


@pytest.mark.slow
def test_kernels_for_arm_are_vectors_and_agree_with_plain_loops(tmp_path):
    emulator, compiler, objdump = need(
        ('qemu-aarch64-static', 'qemu-aarch64'), ARM_COMPILER, ARM_OBJDUMP
    )
    program, (kernels,) = compile_check(compiler, 'aarch64', tmp_path, '-static')
    checked = [line.split(':')[0] for line in lines_of(emulator, program, '60')]
    assert checked == ['portable float', 'portable double']

    functions = re.split(r'\n(?=[0-9a-f]+ <)', '\n'.join(lines_of(objdump, '-dC', kernels)))
    for name in ('advance<4, true, float', 'record<4, true, float', 'retreat<4, float'):
        (body, *_) = (f for f in functions if name in f.split('\n', 1)[0])
        assert len(re.findall(r'\tfml[as]\tv\d+\.4s', body)) >= 20
        assert not re.findall(r'\tfmadd\t', body)  # one lane at a time


@pytest.mark.parametrize('machine', ['aarch64', 'arm64', 'riscv64'])
def test_only_x86_has_files_of_its_own(machine):
    assert build_cpp.kernels(machine) == {'kernels_portable.cpp': []}
    assert set(build_cpp.kernels('x86_64')) == {
        'kernels_portable.cpp',
        'kernels_avx2.cpp',
        'kernels_avx512.cpp',
        'kernels_bf16.cpp',
    }
    assert not any('avx512' in flag for flag in build_cpp.kernels('x86_64')['kernels_avx2.cpp'])


@pytest.mark.parametrize(
    ('clang', 'system', 'brought', 'expected'),
    [
        (False, 'Linux', ['lib/libgomp.so.1'], (['-fopenmp'], ['lib/libgomp.so.1'])),
        (False, 'Linux', [], (['-fopenmp'], ['-fopenmp'])),
        (True, 'Linux', ['lib/libgomp.so.1'], (['-DMMVIM_GOMP'], ['lib/libgomp.so.1'])),
        (True, 'Linux', [], ([], [])),
        (True, 'Darwin', ['lib/libomp.dylib'], ([], [])),
        (
            True,
            'Darwin',
            ['lib/libomp.dylib', 'include/omp.h'],
            (['-Xclang', '-fopenmp'], ['lib/libomp.dylib']),
        ),
    ],
)
def test_threads_are_those_of_the_runtime_that_torch_brought(
    clang, system, brought, expected, tmp_path
):
    (tmp_path / 'lib').mkdir()
    (tmp_path / 'include').mkdir()
    for name in brought:
        (tmp_path / name).touch()
    compiling, linking = build_cpp.openmp(str(tmp_path / 'lib'), clang, system)
    assert (compiling, [flag.removeprefix(f'{tmp_path}/') for flag in linking]) == expected


def test_compilers_are_told_apart():
    for name in ('g++', 'clang++'):
        if shutil.which(name):
            assert build_cpp.is_clang([name, '-O3']) == (name == 'clang++')
