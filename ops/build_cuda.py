"""How ``mmvim_ops/_cuda.so`` is compiled; an install calls it (``build_ops.py``), and so can you:

    python ops/build_cuda.py             # for this machine's GPUs, into this checkout
    python ops/build_cuda.py --verbose   # with the registers and spills of every kernel

It takes nvcc and nothing else: no header of torch, no network. One library serves every version of
torch and Python. ``TORCH_CUDA_ARCH_LIST`` (such as ``8.0;9.0+PTX``) names the GPUs to compile for;
without it these are the ones here, or 8.0 and 9.0 with PTX for later ones. An install compiles it
where torch has CUDA, unless ``MMVIM_OPS_CUDA`` says 0, and where it says 1; it never fails because
of it.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import build_interface
from build_torch import find_torch

SOURCES = Path(__file__).parent / 'csrc' / 'cuda'
TARGET = Path(__file__).parent / 'mmvim_ops' / '_cuda.so'
FLAGS = ['-std=c++17', '-O3', '-Xcompiler=-fPIC,-fvisibility=hidden']
DEFAULT = ['8.0', '9.0+PTX']


def find_nvcc() -> str | None:
    """On the path, else where CUDA is usually installed."""
    homes = [os.environ.get(name) for name in ('CUDA_HOME', 'CUDA_PATH')]
    folders = [Path(home) / 'bin' for home in (*homes, '/usr/local/cuda') if home]
    return shutil.which('nvcc') or shutil.which('nvcc', path=os.pathsep.join(map(str, folders)))


def why_not() -> str | None:
    """What keeps an install from compiling the library; None where nothing is known to."""
    if os.name != 'posix':
        return 'only Linux is supported'
    if find_nvcc() is None:
        return 'there is no nvcc on the PATH or in CUDA_HOME'
    wanted = os.environ.get('MMVIM_OPS_CUDA')
    if wanted in ('0', '1'):
        return None if wanted == '1' else 'MMVIM_OPS_CUDA=0 says so'
    torch = find_torch()
    if torch is None:
        return 'there is no torch (MMVIM_OPS_CUDA=1 compiles them anyway)'
    if torch.cuda is None:
        return f'torch {torch.version} has no CUDA (MMVIM_OPS_CUDA=1 compiles them anyway)'
    return None


def local_architectures() -> list[str]:
    """Compute capabilities of the GPUs here, as the driver's tool tells them."""
    query = ['nvidia-smi', '--query-gpu=compute_cap', '--format=csv,noheader']
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return sorted(set(re.findall(r'^\d+\.\d+$', answer.stdout, re.MULTILINE)))


def architecture_flags(wanted: str | None = None) -> list[str]:
    """What nvcc is told of the GPUs; ``wanted`` as in ``TORCH_CUDA_ARCH_LIST``."""
    names = re.split(r'[;, ]+', wanted.strip()) if wanted else local_architectures() or DEFAULT
    flags = []
    for name in names:
        match = re.fullmatch(r'(\d+)\.(\d+)([a-z]?)(\+PTX)?', name)
        if match is None:
            raise ValueError(f"architectures must be such as '8.0;9.0+PTX', got {name!r}")
        number = ''.join(match.group(1, 2, 3))
        flags.append(f'-gencode=arch=compute_{number},code=sm_{number}')
        if match.group(4):
            flags.append(f'-gencode=arch=compute_{number},code=compute_{number}')
    return flags


def run(command: list[str]) -> str:
    """Both outputs of a command; raises with their end where it fails."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 0:
        raise RuntimeError(f'{Path(command[0]).name} failed:\n{result.stdout[-4000:]}')
    return result.stdout


def build(target: Path = TARGET, verbose: bool = False, more_flags: tuple[str, ...] = ()) -> str:
    """Compile and link the library; returns what the compiler said."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError('there is no nvcc on the PATH or in CUDA_HOME')
    architectures = architecture_flags(os.environ.get('TORCH_CUDA_ARCH_LIST'))
    flags = [*FLAGS, *architectures, *more_flags]
    if verbose:
        flags += ['-Xptxas=-v']
    with tempfile.TemporaryDirectory() as folder:
        build_interface.write_cuda_header(Path(folder))
        flags.append(f'-I{folder}')

        def compile_file(source: Path) -> str:
            return run([nvcc, *flags, '-c', str(source), '-o', f'{folder}/{source.stem}.o'])

        with ThreadPoolExecutor(int(os.environ.get('MAX_JOBS') or os.cpu_count() or 1)) as pool:
            said = list(pool.map(compile_file, sorted(SOURCES.glob('*.cu'))))
        objects = sorted(map(str, Path(folder).glob('*.o')))
        library = f'{folder}/_cuda.so'
        said.append(run([nvcc, '-shared', '-cudart=static', '-o', library, *objects]))
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix('.partial')
        shutil.copy(library, partial)
        partial.replace(target)  # at once: a library that is in use is not written to
    return ''.join(said)


def kernels(said: str) -> list[str]:
    """A line per kernel from what ``-Xptxas=-v`` prints."""
    filt = shutil.which('c++filt')
    if filt is not None:
        said = subprocess.run([filt], input=said, capture_output=True, text=True).stdout
    lines = []
    for part in said.split('Compiling entry function')[1:]:
        name, gpu = re.search(r"'(?:void )?(.*?)(?:\(mmvim::\w+\))?' for '(\w+)'", part).groups()
        stores, loads = re.search(r'(\d+) bytes spill stores, (\d+) bytes spill', part).groups()
        registers = re.search(r'Used (\d+) registers', part).group(1)
        name = name.replace('mmvim::', '')
        lines.append(f'{gpu} {name:68} {registers:>3} registers, spilled {stores} + {loads} bytes')
    return sorted(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--output', type=Path, default=TARGET, help='%(default)s')
    parser.add_argument('--verbose', action='store_true', help='registers of every kernel')
    args = parser.parse_args()
    start = time.perf_counter()
    try:
        said = build(args.output, args.verbose)
    except (RuntimeError, ValueError, OSError) as error:
        print(f'mmvim_ops: the CUDA kernels were not compiled: {error}', file=sys.stderr)
        return 1
    if args.verbose:
        print(*kernels(said), sep='\n')
    print(f'{args.output}: compiled in {time.perf_counter() - start:.0f} s')
    return 0


if __name__ == '__main__':
    sys.exit(main())
