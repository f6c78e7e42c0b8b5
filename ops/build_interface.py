"""What the compiled libraries are told of the Python code that calls them.

``_cpp.so`` defines its operators by the schemas in Python. Each library of operators for torch
carries a hash of the interface between both: the schemas and torch's minor version for ``_cpp.so``,
structures and functions for ``_cuda.so``. Python compares it before it loads a library. The files
that know the interface are loaded by their paths, as torch need not be there to build.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

BACKENDS = Path(__file__).parent / 'mmvim_ops' / 'backends'


def _load(name: str) -> ModuleType:
    path = BACKENDS / f'{name}.py'
    spec = importlib.util.spec_from_file_location(f'interface_{path.stem}', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cpp_flag(torch_version: str) -> str:
    """For the compiler of ``csrc/cpu/interface.cpp``."""
    return f'-DMMVIM_INTERFACE="{_load("schemas").library_interface(torch_version)}"'


def write_cpp_header(folder: Path) -> None:
    """Write ``mmvim_schemas.h``, which ``csrc/cpu/definitions.cpp`` includes."""
    (folder / 'mmvim_schemas.h').write_text(_load('schemas').cpp_header(), encoding='utf-8')


def write_cuda_header(folder: Path) -> None:
    """Write ``mmvim_interface.h``, which ``csrc/cuda/device.cu`` includes."""
    (folder / 'mmvim_interface.h').write_text(_load('cuda/structures').header(), encoding='utf-8')
