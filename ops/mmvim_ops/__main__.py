"""``python -m mmvim_ops``: which backends there are, why one is missing, and a check of each."""

import os
import platform
import sys
import warnings
from importlib import metadata

import torch

from . import memory
from .backends import BACKENDS, Backend, choose_backend, self_check
from .backends.cpp import library

DTYPES = {'': torch.float32, ' in bfloat16': torch.bfloat16}


def check(backend: Backend, device: str) -> tuple[str, bool]:
    """What the errors against the specification are on a device, and whether they are small: scan,
    both directions, convolution, and their gradients."""
    errors, wrong = [], []
    for name, dtype in DTYPES.items():
        found = self_check.differences(backend, device, dtype, self_check.Specification)
        errors.append(f'{self_check.largest_error(found):.0e}{name}')
        wrong.append(self_check.what_is_wrong(found))
    named = [line for line in wrong if line]
    verdict = 'WRONG' if named else 'ok'
    return '; '.join([f'{device}: {verdict}, error {", ".join(errors)}', *named]), not named


def describe(backend: Backend) -> tuple[str, bool]:
    """One line about a backend, and whether it is in order."""
    reason = backend.missing()
    if reason is not None:
        return f'missing: {reason}', True
    devices = ['cpu'] + ['cuda'] * torch.cuda.is_available()
    results = []
    for device in filter(backend.runs_on, devices):
        try:
            results.append(check(backend, device))
        except Exception as problem:  # whatever it is, the other backends are still reported
            results.append((f'{device}: FAILED, {type(problem).__name__}: {problem}', False))
    return '; '.join(line for line, _ in results), all(fine for _, fine in results)


def describe_cpp() -> str:
    """The instruction set of backend 'cpp', and whether it tunes the process's memory."""
    if BACKENDS['cpp'].missing() is not None:
        return ''
    used, others = torch.ops.mmvim_ops.cpp_instruction_set(), ', '.join(library.instruction_sets())
    wanted = os.environ.get(library.ISA)
    setting = f' as {library.ISA}={wanted}' if wanted else ''
    tuned = 'tuned' if library.TUNED else f'left alone as {memory.SWITCH}=0'
    return f', {used} of {others}{setting}, memory {tuned}'


def triton_version() -> str:
    try:
        return f'triton {metadata.version("triton")}'
    except metadata.PackageNotFoundError:
        return 'no triton'


def main() -> int:
    """Print the report; the exit status is 1 where a backend that is there does not work."""
    versions = [
        f'Python {platform.python_version()}',
        f'torch {torch.__version__}',
        triton_version(),
    ]
    print(*versions, platform.machine(), sep=', ')
    print(f'CPU: {torch.get_num_threads()} threads{describe_cpp()}')
    if torch.cuda.is_available():
        print(f'GPU: {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}')
    warnings.simplefilter('ignore')  # the report says what is missing
    fine = True
    for name, backend in BACKENDS.items():
        line, backend_is_fine = describe(backend)
        print(f'{name:8} {line}')
        fine &= backend_is_fine
    print(f'default on the CPU: {choose_backend(None, "cpu").name}')
    if torch.cuda.is_available():
        gpu = torch.device('cuda', torch.cuda.current_device())
        checked = '' if self_check.ENABLED else f', not checked as {self_check.SWITCH}=0'
        print(f'default on the GPU: {choose_backend(None, gpu).name}{checked}')
    return 0 if fine else 1


if __name__ == '__main__':
    sys.exit(main())
