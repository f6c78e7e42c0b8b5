"""Import ``mmvim_ops`` from a checkout that is not installed, too, with the cuda backend's kernels
emulated on the CPU; keep small tests fast."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec('mmvim_ops') is None:
    sys.path.insert(0, str(Path(__file__).parents[2] / 'ops'))
sys.path.insert(0, str(Path(__file__).parent / 'cuda_emulation'))
from build_emulation import build, find_compiler

from mmvim_ops.backends import BACKENDS
from mmvim_ops.backends.cuda import plan as cuda_plan
from mmvim_ops.backends.cuda.library import emulate

if find_compiler() is not None:
    BACKENDS['cuda'].device_types = ('cpu', 'cuda')
    BACKENDS['cuda'].missing = lambda: None


@pytest.fixture(autouse=True, scope='session')
def emulation():
    """Compiles when the first test runs, not when tests are collected."""
    if find_compiler() is not None:
        emulate(build())


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other on a busy machine cost more than these sizes are worth."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cut(monkeypatch):
    """Function that has backend 'cuda' cut scans in another way than it chooses."""

    def fix(**fixed):
        choose = cuda_plan.choose_cut  # which may be fixed in part
        monkeypatch.setattr(
            cuda_plan, 'choose_cut', lambda *given: choose(*given)._replace(**fixed)
        )

    return fix


@pytest.fixture
def chunks(cut):
    """Cut every length into as many chunks as there can be."""
    cut(chunks=1000)
