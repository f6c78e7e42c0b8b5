"""Backend 'triton': run in Triton's interpreter on the CPU, and compiled for GPUs that need not be
here. The tests that run on a GPU are in ../gpu.

Whether kernels are interpreted is settled when they are made. So one test starts pytest again, with
TRITON_INTERPRET=1, on the tests below that need it and on quick ones of those that every backend
has. To run all of these (ten minutes): TRITON_INTERPRET=1 pytest tests/ops -k triton
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scan_cases import TENSORS, assert_same, make_arguments, random_arguments, run
from test_causal_conv1d import make_arguments as make_conv1d_arguments
from test_causal_conv1d import run as run_conv1d

import mmvim_ops
from mmvim_ops import causal_conv1d, selective_scan
from mmvim_ops.backends import BACKENDS
from mmvim_ops.backends.triton import conv1d as triton_conv1d
from mmvim_ops.backends.triton import library
from mmvim_ops.backends.triton import scan as triton_scan
from mmvim_ops.calls import Conv1dCall, Direction, ScanCall
from mmvim_ops.naive import causal_conv1d_naive, selective_scan_naive

triton = pytest.importorskip('triton', minversion=library.OLDEST)
HERE = Path(__file__).parents[1]
INTERPRETED = library.INTERPRETED
interpreted = pytest.mark.skipif(not INTERPRETED, reason='runs in the interpreter, see above')
compiled = pytest.mark.skipif(INTERPRETED, reason='the interpreter compiles nothing')
ops = torch.ops.mmvim_ops


@compiled
@pytest.mark.slow
def test_passes_in_the_interpreter():
    files = (
        'backends/test_triton.py',
        'test_selective_scan.py',
        'test_torch_integration.py',
        'test_causal_conv1d.py',
    )
    chosen = (
        'test_triton.py or triton and (official and not long or strides or reverse_is or '
        'empty or length_one or computes_in or one_graph or recomputed or low_precision or taps)'
    )
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-k', chosen]
        + [HERE / file for file in files],
        env=os.environ | {'TRITON_INTERPRET': '1'},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert ' passed' in result.stdout


# In the interpreter.


@interpreted
@pytest.mark.parametrize('first', range(0, 40, 10))
def test_agrees_with_the_specification_on_random_arguments(first, monkeypatch):
    monkeypatch.setattr(triton_scan, 'CHUNK', 8)
    for seed in range(first, first + 10):
        arguments = random_arguments(seed, batch=1 + seed % 2, length=[1, 3, 7, 8, 19][seed % 5])
        expected = run(selective_scan_naive, arguments)
        assert_same(run(selective_scan, arguments, backend='triton'), expected, 2e-5)


@interpreted
def test_more_chunks_than_carried_at_once_and_batches_in_parts(monkeypatch):
    monkeypatch.setattr(triton_scan, 'CHUNK', 4)
    monkeypatch.setattr(triton_scan, 'SCRATCH', 1)
    arguments = make_arguments(
        batch=3, channels=40, length=39, states=16, groups_B=0, groups_C=None
    )
    expected = run(selective_scan_naive, arguments)
    assert_same(run(selective_scan, arguments, backend='triton'), expected, 2e-5)


@interpreted
@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('activation', ['silu', None])
def test_convolution_agrees_with_the_specification(activation, reverse, monkeypatch):
    """Tiles of all borders: several of steps and of channels, the last ones short."""
    monkeypatch.setattr(triton_conv1d, 'STEPS', 16)
    monkeypatch.setattr(triton_conv1d, 'WIDTH', 8)
    for channels, length, taps, bias in ((1, 1, 1, True), (11, 37, 4, True), (8, 16, 19, False)):
        arguments = make_conv1d_arguments(2, channels, length, taps, reverse, bias)
        options = dict(reverse=reverse, activation=activation)
        expected = run_conv1d(causal_conv1d_naive, arguments, **options)
        actual = run_conv1d(causal_conv1d, arguments, **options, backend='triton')
        assert_same(actual, expected, 1e-5)


@interpreted
def test_opcheck_of_the_convolution():
    x, weight, bias = (t.requires_grad_() for t in make_conv1d_arguments(1, 3, 5, 4))
    torch.library.opcheck(ops.triton_conv1d.default, (x, weight, bias, True, True))
    torch.library.opcheck(ops.triton_conv1d.default, (x, weight, None, False, False))


@interpreted
def test_padding_leaves_infinite_state_matrices_alone():
    arguments = make_arguments(length=5)
    arguments['A'][1, 1] = -torch.inf
    expected = run(selective_scan_naive, arguments, with_gradients=False)
    actual = run(selective_scan, arguments, with_gradients=False, backend='triton')
    assert_same(actual, expected, 2e-5)


@interpreted
def test_is_never_the_default_on_the_cpu():
    assert 'triton' in mmvim_ops.available_backends()
    assert mmvim_ops.backends.choose_backend(None, 'cpu').name != 'triton'
    assert mmvim_ops.backends.choose_backend(None, 'cuda').name != 'triton'


@interpreted
@pytest.mark.parametrize(
    'case',
    [
        dict(groups_B=0, groups_C=0, channels_last=True),
        dict(groups_B=None, groups_C=3),
        dict(skip=False, gate=False, bias=False, softplus=False, length=1),
        dict(dtype=torch.bfloat16, length=1),
    ],
)
def test_opcheck_of_the_operator(case, monkeypatch):
    monkeypatch.setattr(triton_scan, 'CHUNK', 4)
    arguments = make_arguments(**dict(batch=1, length=5) | case)
    arguments = [None if (x := arguments[name]) is None else x.requires_grad_() for name in TENSORS]
    torch.library.opcheck(ops.triton_scan.default, (*arguments, True, False, True))
    with torch.no_grad():
        torch.library.opcheck(ops.triton_scan.default, (*arguments, False, True, False))


# Compiled, without a GPU.


class NoGpu:
    """What Triton asks of a driver when it compiles."""

    def __init__(self, capability):
        self.target = triton.backends.compiler.GPUTarget('cuda', capability, 32)

    def get_current_device(self):
        return self.target.arch  # Triton keeps the kernels of every device

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self.target


@pytest.fixture
def compile_only(monkeypatch, tmp_path):
    """Let launches compile for a GPU of this capability and stop there; returns the kernels."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    kernels = []
    launch = JITFunction.run

    def compile_kernel(self, *arguments, warmup, **more):
        kernels.append((self.__name__, launch(self, *arguments, warmup=True, **more)))

    def for_capability(capability):
        monkeypatch.setattr(JITFunction, 'run', compile_kernel)
        monkeypatch.setattr(triton.knobs.cache, 'dir', str(tmp_path))
        monkeypatch.setattr(driver, '_active', NoGpu(capability))
        return kernels

    return for_capability


def scan_on_triton(return_last_state, *, z, delta_softplus, reverse, **direction):
    """The backend's own, as it is not available here."""
    call = ScanCall(Direction(**direction), z, delta_softplus, reverse)
    return BACKENDS['triton'].scan(call)


def stack_bytes(cubin, tmp_path):
    """What a kernel keeps in memory per thread as it runs out of registers."""
    file = tmp_path / 'kernel.cubin'
    file.write_bytes(cubin)
    tool = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'
    usage = subprocess.run([tool, '-res-usage', file], capture_output=True, text=True, check=True)
    return int(usage.stdout.split('STACK:')[1].split()[0])


@compiled
@pytest.mark.parametrize('capability', [80, 90])
@pytest.mark.slow
def test_compiles_and_fits_into_the_registers(capability, compile_only, tmp_path):
    kernels = compile_only(capability)
    arguments = make_arguments(
        channels=384,
        length=256,
        states=16,
        groups_B=0,
        groups_C=0,
        channels_last=True,
        dtype=torch.bfloat16,
    )
    for name in 'BC':  # as the Vim block has them: states next to each other
        arguments[name] = arguments[name].mT.contiguous().mT
    run(scan_on_triton, arguments)
    names = [name for name, _ in kernels]
    assert names == ['chunk_ends', 'carry', 'forward', 'chunk_ends', 'carry', 'backward']
    for name, kernel in kernels:
        assert f'.target sm_{capability}' in kernel.asm['ptx'], name
        # Of a kilobyte of registers; it is 64 in `backward` on sm_80, 24 on sm_90, else 0.
        assert stack_bytes(kernel.asm['cubin'], tmp_path) <= 64, name


@compiled
@pytest.mark.parametrize('capability', [80, 90])
def test_the_convolution_compiles_and_fits_into_the_registers(capability, compile_only, tmp_path):
    kernels = compile_only(capability)
    x, weight, bias = make_conv1d_arguments(2, 384, 256, 4, dtype=torch.bfloat16)
    given = x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    out = BACKENDS['triton'].conv1d(Conv1dCall(*given, True, False))
    torch.autograd.grad(out.sum(), given)
    assert [name for name, _ in kernels] == ['forward', 'backward', 'forward']
    for name, kernel in kernels:
        assert f'.target sm_{capability}' in kernel.asm['ptx'], name
        assert stack_bytes(kernel.asm['cubin'], tmp_path) == 0, name


@compiled
@pytest.mark.parametrize(
    'case',
    [
        dict(groups_B=None, groups_C=3, gate=False, skip=False, reverse=True),
        dict(groups_B=None, groups_C=None, bias=False, softplus=False, dtype=torch.float64),
    ],
)
def test_compiles_other_arguments(case, compile_only):
    kernels = compile_only(90)
    arguments = make_arguments(length=70, **case)
    run(scan_on_triton, arguments)
    assert len(kernels) == 6
