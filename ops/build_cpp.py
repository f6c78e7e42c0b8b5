"""How ``mmvim_ops/_cpp.so`` is compiled; ``build_ops.py`` calls it.

Every instruction set gets its own file and flags, which is why torch's extension builder (one set
of flags for all) is not used. The library has no Python in it: the operators register themselves
with torch when it is loaded. An install never fails because of it; what stands in the way is
printed, and the package works without.

``MMVIM_OPS_CXXFLAGS`` is added to every compiler and linker call, e.g. for sanitizers.
"""

import os
import platform
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import build_interface
from build_torch import Torch, find_torch
from setuptools import Extension
from setuptools.command.build_ext import build_ext

SOURCES = Path(__file__).parent / 'csrc' / 'cpu'
OPERATORS = ('operators.cpp', 'dispatch.cpp')
INTERFACE = 'interface.cpp'  # no torch in it either
COMMON = [
    '-O3',
    '-fPIC',
    '-g0',
    '-Wno-psabi',
    '-Wno-uninitialized',
    '-Wno-maybe-uninitialized',
    '-Wno-unknown-warning-option',  # clang does not know the one before
]


def kernels(machine: str) -> dict[str, list[str]]:
    """Files of the instruction sets that are chosen from at run time, with their flags.

    They include no torch header, so that no inline function of torch is compiled for a processor
    that may not be there. On Arm, NEON belongs to every 64-bit processor: the portable file has it.
    """
    files: dict[str, list[str]] = {'kernels_portable.cpp': []}
    if machine in ('x86_64', 'AMD64'):
        files['kernels_avx2.cpp'] = ['-mavx2', '-mfma']
        files['kernels_avx512.cpp'] = [
            '-mavx512f',
            '-mavx512dq',
            '-mavx512bw',
            '-mavx512vl',
            '-mfma',
            '-mprefer-vector-width=512',
        ]
    return files


KERNELS = kernels(platform.machine())


def why_not() -> str | None:
    """What keeps the library from being compiled here; None where nothing is known to."""
    if find_torch() is None:
        return (
            'there is no torch to compile them for: install torch first, then '
            'pip install --no-build-isolation'
        )
    if os.name != 'posix':
        return 'it takes GCC or clang'
    return None


def extensions() -> list[Extension]:
    """For ``setup(ext_modules=...)``: the library, or nothing where it cannot be compiled."""
    reason = why_not()
    if reason is not None:
        print(f'mmvim_ops: the compiled CPU kernels are left out: {reason}', file=sys.stderr)
        return []
    return [
        Extension(
            'mmvim_ops._cpp',
            [source(name) for name in (*KERNELS, *OPERATORS, INTERFACE)],
            optional=True,
        )
    ]


def source(name: str) -> str:
    """Path as setuptools wants it: relative to setup.py."""
    return os.path.relpath(SOURCES / name)


class BuildOps(build_ext):
    """For ``setup(cmdclass=...)``: compiles the library and survives where that fails."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split('.')) + '.so'  # no Python ABI in it

    def build_extension(self, ext):
        try:
            self.compile_and_link(Path(self.get_ext_fullpath(ext.name)))
        except Exception as error:
            print(f'mmvim_ops: the compiled CPU kernels are left out: {error}', file=sys.stderr)

    def compile_and_link(self, target: Path):
        torch = find_torch()
        extra = shlex.split(os.environ.get('MMVIM_OPS_CXXFLAGS', ''))
        command = getattr(self.compiler, 'compiler_so_cxx', self.compiler.compiler_so)
        threads, runtime = openmp(torch.libraries, is_clang(command), platform.system())

        def compile_file(name: str) -> str:
            if name in KERNELS:
                return self.compile_one(name, [], ['-std=c++17', *KERNELS[name], *extra])
            if name == INTERFACE:
                flags = ['-std=c++17', build_interface.cpp_flag(torch.version), *extra]
                return self.compile_one(name, [], flags)
            return self.compile_one(name, [torch.include], [*torch_flags(torch), *threads, *extra])

        with ThreadPoolExecutor(int(os.environ.get('MAX_JOBS') or os.cpu_count() or 1)) as pool:
            objects = list(pool.map(compile_file, (*OPERATORS, *KERNELS, INTERFACE)))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects,
            str(target),
            library_dirs=[torch.libraries],
            libraries=['torch_cpu', 'c10'],
            extra_postargs=[*runtime, *extra],
            target_lang='c++',
        )

    def compile_one(self, name: str, include: list[str], flags: list[str]) -> str:
        (output,) = self.compiler.compile(
            [source(name)],
            output_dir=self.build_temp,
            include_dirs=include,
            extra_postargs=[*COMMON, *flags],
        )
        return output


def torch_flags(torch: Torch) -> list[str]:
    """Flags for files that include torch's headers."""
    return [
        f'-std={"c++20" if torch.minor >= (2, 10) else "c++17"}',
        f'-D_GLIBCXX_USE_CXX11_ABI={torch.cxx11_abi}',
    ]


def openmp(folder: str, clang: bool, system: str) -> tuple[list[str], list[str]]:
    """Flags of compiler and linker for threads, with a torch whose libraries are in ``folder``.

    It has to be the OpenMP runtime that torch brought: two would not share their threads. Where
    clang would bring another one, libgomp is called directly (``parallel.h``). Nothing is returned
    where that cannot be done: the kernels run in one thread.
    """
    name = 'libomp*.dylib' if system == 'Darwin' else 'libgomp*.so*'
    brought = [str(library) for library in sorted(Path(folder).glob(name))[:1]]
    if not clang:
        return ['-fopenmp'], brought or ['-fopenmp']
    if not brought:
        return [], []
    if system == 'Darwin':
        header = Path(folder).parent / 'include/omp.h'
        return (['-Xclang', '-fopenmp'], brought) if header.exists() else ([], [])
    return ['-DMMVIM_GOMP'], brought


def is_clang(compiler: list[str]) -> bool:
    """Whether this command, with whatever flags, is clang or Apple's."""
    answer = subprocess.run([*compiler, '--version'], capture_output=True, text=True)
    return 'clang' in answer.stdout
