"""How ``mmvim_ops/_cpp.so`` and ``_onnxruntime.so`` are compiled; ``build_ops.py`` calls it.

Both have the same kernels, the first for torch, the second for ONNX Runtime. Every instruction set
gets its own file and flags, which is why torch's extension builder (one set of flags for all) is
not used. There is no Python in the libraries: operators register themselves when one is loaded. The
second needs neither torch nor ONNX Runtime to be compiled or copied elsewhere. An install never
fails because of them; what stands in the way is printed, and the package works without.

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
ONNXRUNTIME = '../onnxruntime/operators.cpp'  # nor in it
FOR_TORCH, FOR_ONNXRUNTIME = 'mmvim_ops._cpp', 'mmvim_ops._onnxruntime'
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
        files['kernels_bf16.cpp'] = [*files['kernels_avx512.cpp'], '-mavx512bf16']
    return files


KERNELS = kernels(platform.machine())
LIBRARIES = {
    FOR_TORCH: (*OPERATORS, *KERNELS, INTERFACE),
    FOR_ONNXRUNTIME: (ONNXRUNTIME, 'dispatch.cpp', *KERNELS),
}


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
    """For ``setup(ext_modules=...)``: the libraries, or nothing where they cannot be compiled."""
    reason = why_not()
    if reason is not None:
        print(f'mmvim_ops: the compiled CPU kernels are left out: {reason}', file=sys.stderr)
        return []
    return [
        Extension(name, [source(file) for file in files], optional=True)
        for name, files in LIBRARIES.items()
    ]


def source(name: str) -> str:
    """Path as setuptools wants it: relative to setup.py."""
    return os.path.relpath(SOURCES / name)


class BuildOps(build_ext):
    """For ``setup(cmdclass=...)``: compiles the libraries and survives where that fails."""

    def initialize_options(self):
        super().initialize_options()
        self.compiled = {}  # object files: the libraries share some

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split('.')) + '.so'  # no Python ABI in it

    def build_extension(self, ext):
        try:
            self.compile_and_link(ext.name, Path(self.get_ext_fullpath(ext.name)))
        except Exception as error:
            print(f'mmvim_ops: {ext.name} is left out: {error}', file=sys.stderr)

    def compile_and_link(self, name: str, target: Path):
        torch = find_torch()
        extra = shlex.split(os.environ.get('MMVIM_OPS_CXXFLAGS', ''))
        command = getattr(self.compiler, 'compiler_so_cxx', self.compiler.compiler_so)
        threads, runtime = openmp(torch.libraries, is_clang(command), platform.system())
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        build_interface.write_cpp_header(Path(self.build_temp))
        missing = [file for file in LIBRARIES[name] if file not in self.compiled]
        with ThreadPoolExecutor(int(os.environ.get('MAX_JOBS') or os.cpu_count() or 1)) as pool:
            objects = pool.map(lambda file: self.compile_file(file, torch, threads, extra), missing)
            self.compiled.update(zip(missing, objects, strict=True))
        if name == FOR_TORCH:
            libraries = ['torch_cpu', 'c10']
            flags = [*runtime, *extra]
        else:
            libraries, flags = [], extra
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            [self.compiled[file] for file in LIBRARIES[name]],
            str(target),
            library_dirs=[torch.libraries] if libraries else [],
            libraries=libraries,
            extra_postargs=flags,
            target_lang='c++',
        )

    def compile_file(self, name: str, torch: Torch, threads: list[str], extra: list[str]) -> str:
        if name in KERNELS:
            return self.compile_one(name, [], ['-std=c++17', *KERNELS[name], *extra])
        if name == INTERFACE:
            flags = ['-std=c++17', build_interface.cpp_flag(torch.version), *extra]
            return self.compile_one(name, [], flags)
        flags = [*torch_flags(torch), *extra]
        if name == ONNXRUNTIME:
            return self.compile_one(name, [], ['-fvisibility=hidden', *flags])
        return self.compile_one(name, [torch.include, self.build_temp], [*flags, *threads])

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
