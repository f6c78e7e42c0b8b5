"""On a GPU nothing is emulated; on the CPU the plan cuts and tiles as if sequences were long."""

import pytest
from build_emulation import build, find_compiler
from gpu_cases import EMULATED

from mmvim_ops.backends.cuda import library
from mmvim_ops.backends.torch import scan as torch_scan
from mmvim_ops.backends.triton import scan as triton_scan


@pytest.fixture(autouse=True, scope='session')
def emulation():
    """In place of that for all tests: its compilation would be GPU time for nothing."""
    if EMULATED and find_compiler() is not None:
        library.emulate(build())


@pytest.fixture(autouse=True)
def sizes(monkeypatch):
    if EMULATED:
        monkeypatch.setattr(triton_scan, 'CHUNK', 8)  # steps cost Python's time in the interpreter
    else:
        monkeypatch.setattr(torch_scan, 'TILE', 1 << 24)  # the reference in fewer launches
