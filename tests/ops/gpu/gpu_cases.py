"""Where the tests of this folder run, by which backends, and what they compare with.

They run on a GPU. With MMVIM_TEST_EMULATED=1 the same tests run on the CPU, at smaller sizes:
backend 'cuda' in its emulation and, with TRITON_INTERPRET=1, 'triton' in Triton's interpreter.
"""

import os

import pytest
import torch
from build_emulation import find_compiler
from scan_cases import assert_accurate, map_tensors, run, to_double
from test_bidirectional import run as run_both

from mmvim_ops import bidirectional_selective_scan, selective_scan
from mmvim_ops.backends.cuda import library as cuda_library
from mmvim_ops.backends.triton import library as triton_library

EMULATED = os.environ.get('MMVIM_TEST_EMULATED') == '1'
DEVICE = 'cpu' if EMULATED else 'cuda'
TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = list(TOLERANCES)

# What the Vim block has. Triton compiles its kernels for each combination of dtype, flags, states
# and divisibility by 16, so most tests give it this one.
USUAL = dict(channels=64, states=16, groups_B=0, groups_C=0, channels_last=True)


def missing(backend: str) -> str | None:
    """Why these tests cannot run with a backend; None where they can."""
    if not EMULATED and not torch.cuda.is_available():
        return 'there is no CUDA device; MMVIM_TEST_EMULATED=1 runs this on the CPU'
    if backend == 'triton':
        if EMULATED and not triton_library.INTERPRETED:
            return 'on the CPU it needs TRITON_INTERPRET=1'
        return triton_library.missing()
    if EMULATED:
        return 'there is no C++ compiler' if find_compiler() is None else None
    found = cuda_library._compiled
    return found if isinstance(found, str) else None


def marks(backend: str) -> list:
    reason = missing(backend)
    skip = pytest.mark.skipif(reason is not None, reason=f"'{backend}': {reason}")
    return [skip, pytest.mark.triton] if backend == 'triton' else [skip]


def each_case(name: str, cuda, triton=()):
    """Run a test with every value of ``name`` that is listed for a backend."""
    return pytest.mark.parametrize(
        f'backend, {name}',
        [
            pytest.param(backend, value, marks=marks(backend), id=f'{backend}-{name}={value}')
            for backend, values in (('cuda', cuda), ('triton', triton))
            for value in values
        ],
    )


each_backend = pytest.mark.parametrize(
    'backend', [pytest.param(name, marks=marks(name)) for name in ('cuda', 'triton')]
)
cuda_only = pytest.mark.parametrize('backend', [pytest.param('cuda', marks=marks('cuda'))])


def size(on_gpu, emulated):
    return emulated if EMULATED else on_gpu


def skip_if_too_large(states: int, directions: int, lanes: int, warps: int) -> None:
    """Blocks of backend 'cuda' that the GPU here has not enough shared memory for."""
    used = cuda_library.library(DEVICE).mmvim_shared_bytes(states, lanes, warps, directions, True)
    there = cuda_library.limits(torch.device(DEVICE))[1]
    if used > there:
        pytest.skip(f'a block would have {used} bytes of shared memory, the GPU allows {there}')


def to_device(x):
    """Strides stay where a tensor fills its memory; other layouts are made on the device."""
    return map_tensors(lambda t: t.detach().to(DEVICE), x)


def synchronize() -> None:
    if not EMULATED:
        torch.cuda.synchronize()


def check_scan(arguments: dict, backend: str, given: dict | None = None) -> None:
    """Compare a scan and its gradients with those of backend 'torch' in float64.

    Args:
        arguments (dict): Of :func:`mmvim_ops.selective_scan`.
        given (dict | None): What the backend gets, where it is laid out in another way.
    """
    exact = run(selective_scan, to_double(arguments), backend='torch')
    plain = run(selective_scan, arguments, backend='torch')
    actual = run(selective_scan, arguments if given is None else given, backend=backend)
    assert_accurate(actual, plain, exact, TOLERANCES[arguments['u'].dtype])


def check_both(arguments: tuple, backend: str, given: tuple | None = None, scale=0.5) -> None:
    """The same of both directions, the gate and the softplus flag."""
    more = dict(scale=scale, backend='torch')
    exact = run_both(bidirectional_selective_scan, *to_double(arguments), **more)
    plain = run_both(bidirectional_selective_scan, *arguments, **more)
    given = arguments if given is None else given
    actual = run_both(bidirectional_selective_scan, *given, scale=scale, backend=backend)
    assert_accurate(actual, plain, exact, TOLERANCES[arguments[0].u.dtype])


def assert_equal(actual, expected) -> None:
    """Bit by bit."""
    for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(one, other), f'result {index} differs, by {(one - other).abs().max()}'
