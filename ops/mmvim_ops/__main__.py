"""``python -m mmvim_ops``: which backends there are, why one is missing, and a check of each."""

import os
import platform
import sys
import warnings
from importlib import metadata

import torch

from . import memory
from .backends import BACKENDS, Backend, choose_backend
from .backends.cpp import library
from .interface import (
    Direction,
    bidirectional_selective_scan,
    causal_conv1d,
    selective_scan,
)
from .naive import causal_conv1d_naive, selective_scan_naive

TOLERANCE = 1e-4


def arguments(device: str) -> dict[str, torch.Tensor]:
    """A small scan with everything in it."""
    torch.manual_seed(0)
    batch, channels, length, states = 2, 40, 300, 16
    sequences = {name: torch.randn(batch, length, channels).mT for name in ('u', 'delta', 'z')}
    matrices = {name: torch.randn(batch, states, length) for name in 'BC'}
    vectors = {name: torch.randn(channels) for name in ('D', 'delta_bias')}
    tensors = {'A': -torch.rand(channels, states), **sequences, **matrices, **vectors}
    return {name: x.to(device).requires_grad_() for name, x in tensors.items()}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def gradients(actual, expected, leaves, weight) -> zip:
    """Pairs of the gradients of two outputs."""
    return zip(
        torch.autograd.grad(actual, leaves, weight, retain_graph=True),
        torch.autograd.grad(expected, leaves, weight, retain_graph=True),
        strict=True,
    )


def check(backend: str, device: str) -> float:
    """Largest relative error against the specification: scan, both directions, convolution, and
    their gradients."""
    given = arguments(device)
    leaves = list(given.values())
    out = selective_scan(**given, delta_softplus=True, reverse=True, backend=backend)
    expected = selective_scan_naive(**given, delta_softplus=True, reverse=True)
    weight = torch.randn(out.shape).to(device)
    pairs = [(out, expected)]
    pairs += gradients(out, expected, leaves, weight)
    z = given.pop('z')
    direction = Direction(**given)
    both = bidirectional_selective_scan(direction, direction, z, True, backend=backend)
    expected = expected + selective_scan_naive(**given, z=z, delta_softplus=True)
    pairs.append((both, expected))
    pairs += gradients(both, expected, leaves, weight)
    taps = torch.randn(given['u'].shape[1], 4).to(device).requires_grad_()
    leaves = [given['u'], taps, given['D']]
    convolved = causal_conv1d(*leaves, backend=backend)
    expected = causal_conv1d_naive(*leaves)
    pairs.append((convolved, expected))
    pairs += gradients(convolved, expected, leaves, weight)
    return max(relative_error(*pair) for pair in pairs)


def describe(backend: Backend) -> tuple[str, bool]:
    """One line about a backend, and whether it is in order."""
    reason = backend.missing()
    if reason is not None:
        return f'missing: {reason}', True
    devices = ['cpu'] + ['cuda'] * torch.cuda.is_available()
    results = []
    for device in filter(backend.runs_on, devices):
        try:
            error = check(backend.name, device)
        except Exception as problem:  # whatever it is, the other backends are still reported
            results.append((f'{device}: FAILED, {type(problem).__name__}: {problem}', False))
        else:
            verdict = 'ok' if error < TOLERANCE else 'WRONG'
            results.append((f'{device}: {verdict}, error {error:.0e}', error < TOLERANCE))
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
        print(f'default on the GPU: {choose_backend(None, "cuda").name}')
    return 0 if fine else 1


if __name__ == '__main__':
    sys.exit(main())
