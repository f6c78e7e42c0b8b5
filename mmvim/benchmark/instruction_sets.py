"""Holding a process to an instruction set of the processor, and all that computes in it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

__all__ = ['ENVIRONMENTS', 'environment']

# What limits our kernels, torch's own, and the matrix products of oneDNN and MKL. Each of them
# reads its variable once, when it is loaded. MKL takes AVX2 on AMD whatever it is allowed.
ENVIRONMENTS: dict[str, dict[str, str]] = {
    'avx512': {
        'MMVIM_OPS_ISA': 'avx512',
        'ATEN_CPU_CAPABILITY': 'avx512',
        'ONEDNN_MAX_CPU_ISA': 'AVX512_CORE_FP16',  # all but AMX
        'MKL_ENABLE_INSTRUCTIONS': 'AVX512',
    },
    'avx2': {
        'MMVIM_OPS_ISA': 'avx2',
        'ATEN_CPU_CAPABILITY': 'avx2',
        'ONEDNN_MAX_CPU_ISA': 'AVX2',
        'MKL_ENABLE_INSTRUCTIONS': 'AVX2',
    },
    'portable': {
        'MMVIM_OPS_ISA': 'portable',
        'ATEN_CPU_CAPABILITY': 'default',
        'ONEDNN_MAX_CPU_ISA': 'SSE41',
        'MKL_ENABLE_INSTRUCTIONS': 'SSE4_2',
    },
}


@contextlib.contextmanager
def environment(isa: str) -> Iterator[None]:
    """Let processes that are started inside use ``isa`` and nothing better.

    Args:
        isa (str): A key of ``ENVIRONMENTS``; ``''``: what this process would use.
    """
    wanted = ENVIRONMENTS[isa] if isa else {}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
