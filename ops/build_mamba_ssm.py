"""Compile the CUDA scan of ``mamba_ssm``, which ops/benchmark_gpu.py measures ours beside.

    pip download --no-deps --no-binary :all: mamba_ssm    # where there is a network
    python ops/build_mamba_ssm.py mamba_ssm-2.3.2.post1.tar.gz build/mamba_ssm
    PYTHONPATH=build/mamba_ssm python -c 'import torch, selective_scan_cuda'

It takes the source distribution (or an unpacked one), a CUDA torch and nvcc: no network, no ninja,
and none of what the package's own setup asks for.
"""

import argparse
import os
import sys
import sysconfig
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from build_cpp import torch_flags
from build_cuda import architecture_flags, find_nvcc, run
from build_torch import find_torch

MODULE = 'selective_scan_cuda'
# As in its own setup.py.
FLAGS = ['-O3', '--expt-relaxed-constexpr', '--expt-extended-lambda', '--use_fast_math']
LIBRARIES = ['torch', 'torch_cpu', 'torch_cuda', 'torch_python', 'c10', 'c10_cuda']


def sources(source: Path, folder: str) -> list[Path]:
    """The files of the scan, unpacked into ``folder`` if need be."""
    if source.is_file():
        with tarfile.open(source) as archive:
            archive.extractall(folder, filter='data')
        source = Path(folder)
    scans = list(source.glob('**/csrc/selective_scan'))
    if len(scans) != 1:
        raise RuntimeError(f'{source} must have one folder csrc/selective_scan, has {len(scans)}')
    return sorted([*scans[0].glob('*.cpp'), *scans[0].glob('*.cu')])


def build(source: Path, target: Path) -> Path:
    """Compile and link the Python module into the folder ``target``."""
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    nvcc = find_nvcc()
    if nvcc is None or torch.version.cuda is None:
        raise RuntimeError('it takes a torch with CUDA, and nvcc on the PATH or in CUDA_HOME')
    standard, abi = torch_flags(find_torch())
    includes = [*include_paths(), sysconfig.get_paths()['include']]
    flags = [
        *(standard, abi, *FLAGS, '-Xcompiler=-fPIC', f'-DTORCH_EXTENSION_NAME={MODULE}'),
        *architecture_flags(os.environ.get('TORCH_CUDA_ARCH_LIST')),
        *(f'-I{folder}' for folder in includes),
    ]
    module = target / f'{MODULE}{sysconfig.get_config_var("EXT_SUFFIX")}'
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:

        def compile_file(file: Path) -> str:
            result = f'{folder}/{file.name}.o'
            run([nvcc, *flags, '-c', str(file), '-o', result])
            print(f'compiled {file.name}', flush=True)
            return result

        with ThreadPoolExecutor(int(os.environ.get('MAX_JOBS') or os.cpu_count() or 1)) as pool:
            objects = list(pool.map(compile_file, sources(source, folder)))
        libraries = [f'-l{name}' for name in LIBRARIES]
        paths = [f'-L{path}' for path in library_paths()]
        run([nvcc, '-shared', '-o', str(module), *objects, *paths, *libraries])
    return module


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('source', type=Path, help='.tar.gz or folder')
    parser.add_argument('target', type=Path, help='folder for the module')
    args = parser.parse_args()
    start = time.perf_counter()
    try:
        module = build(args.source, args.target)
    except (RuntimeError, OSError, tarfile.TarError) as error:
        print(f'mamba_ssm was not compiled: {error}', file=sys.stderr)
        return 1
    print(f'{module}: compiled in {time.perf_counter() - start:.0f} s')
    return 0


if __name__ == '__main__':
    sys.exit(main())
