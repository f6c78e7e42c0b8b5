"""Import ``mmvim_ops`` from a checkout that is not installed, too; keep small tests fast."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec('mmvim_ops') is None:
    sys.path.insert(0, str(Path(__file__).parents[2] / 'ops'))


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other on a busy machine cost more than these sizes are worth."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
