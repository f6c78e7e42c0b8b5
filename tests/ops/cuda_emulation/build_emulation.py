"""Compiles the kernels of the cuda backend for the CPU, with the host's C++ compiler.

The library has a name of its own for any sources and flags (CXX, CXXFLAGS).
"""

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / 'ops'))
import build_interface

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
KERNELS = ROOT / 'ops/csrc/cuda'
FLAGS = ['-std=c++17', '-O2', '-fPIC', '-DMMVIM_EMULATED', f'-I{HERE}', '-U_FORTIFY_SOURCE']


def find_compiler() -> str | None:
    return os.environ.get('CXX') or shutil.which('g++') or shutil.which('c++')


def build() -> Path:
    """The library, compiled where it is not there yet for these sources and flags.

    Raises:
        RuntimeError: There is no compiler, or it does not take the sources.
    """
    compiler = find_compiler()
    if compiler is None:
        raise RuntimeError('there is no C++ compiler')
    flags = FLAGS + shlex.split(os.environ.get('CXXFLAGS', ''))
    interface = build_interface.BACKENDS / 'cuda/structures.py'
    sources = sorted([*KERNELS.iterdir(), *HERE.glob('*.h'), interface])
    key = hashlib.sha256(repr((compiler, flags)).encode())
    for source in sources:
        key.update(source.name.encode() + source.read_bytes())
    target = ROOT / f'build/cuda_emulation/{key.hexdigest()[:16]}.so'
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / 'lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes beside each other compile once
        if not target.exists():
            _compile(compiler, flags, sources, target)
    return target


def _compile(compiler: str, flags: list[str], sources: list[Path], target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        build_interface.write_cuda_header(Path(folder))

        def run(*command: str) -> None:
            result = subprocess.run(
                [compiler, *flags, f'-I{folder}', *command],
                capture_output=True,
                text=True,
                cwd=folder,
            )
            if result.returncode != 0:
                raise RuntimeError(f'{compiler} failed:\n{result.stderr[-3000:]}')

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            units = [source for source in sources if source.suffix == '.cu']
            list(pool.map(lambda unit: run('-c', '-x', 'c++', str(unit)), units))
        run('-shared', '-o', 'library.so', *(f'{unit.stem}.o' for unit in units))
        os.replace(f'{folder}/library.so', target)
