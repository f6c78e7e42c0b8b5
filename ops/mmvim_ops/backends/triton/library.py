"""The installed Triton: whether it is there, recent enough, and has something to run on."""

import os
from importlib import metadata

import torch

OLDEST = '3.3'  # the first Triton whose kernels take tuples

# Triton reads this once, too. Its interpreter runs the kernels on the CPU, for tests.
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'


def _problem_with_package() -> str | None:
    try:
        version = metadata.version('triton')
    except metadata.PackageNotFoundError:
        return 'Triton is not installed; run: pip install triton'
    if [int(part) for part in version.split('.')[:2]] < [int(part) for part in OLDEST.split('.')]:
        return f'Triton {version} is older than {OLDEST}; run: pip install --upgrade triton'
    return None


PROBLEM = _problem_with_package()


def missing() -> str | None:
    """Why the backend cannot run on this machine; None where it can."""
    if PROBLEM is None and not INTERPRETED and not torch.cuda.is_available():
        return 'there is no CUDA device (TRITON_INTERPRET=1 runs it on the CPU, for tests)'
    return PROBLEM
