"""More than 2³¹ elements in a tensor: offsets have 64 bits.

It takes up to 50 GB of the GPU, so it runs only where nothing else does, not in one of several
processes of pytest-xdist.
"""

import os

import pytest
import torch
from gpu_cases import DEVICE, EMULATED, each_backend, size
from scan_cases import relative_error

from mmvim_ops import causal_conv1d, selective_scan

CHANNELS, LENGTH, STATES = 768, size((1 << 31) // 768 + 5000, 300), 16
LAST = slice(CHANNELS - 32, CHANNELS)  # channels whose elements are beyond, if rows are of time
SEQUENCE = 2 * CHANNELS * LENGTH  # bytes


@pytest.fixture
def room():
    """Skips where the GPU has not so many bytes."""

    def ask(wanted):
        if EMULATED:
            return
        if int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 1)) > 1:
            pytest.skip('it needs the GPU for itself: run this file without -n')
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        if free < wanted:
            pytest.skip(f'it needs {wanted / 1e9:.0f} GB, {free / 1e9:.0f} GB are free')

    yield ask
    if not EMULATED:
        torch.cuda.empty_cache()


def sequence(channels_last):
    shape = (1, LENGTH, CHANNELS) if channels_last else (1, CHANNELS, LENGTH)
    x = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_()
    return x.mT if channels_last else x


def cut(x):
    return x[:, LAST].detach().clone()


@each_backend
@pytest.mark.parametrize('channels_last', [False, True])
def test_a_scan_of_2_to_the_31_elements(backend, channels_last, room):
    """Its last channels, which are beyond, are those of a scan of them alone."""
    training = backend == 'cuda'  # that of Triton would need more memory than there is
    room((11 if training else 5) * SEQUENCE)
    torch.manual_seed(0)
    with torch.set_grad_enabled(training):
        u, delta = (sequence(channels_last).requires_grad_(training) for _ in range(2))
        A = -torch.rand(CHANNELS, STATES, device=DEVICE) * 2 - 0.05
        B, C = (
            torch.randn(1, LENGTH, STATES, dtype=torch.bfloat16, device=DEVICE).mT for _ in range(2)
        )
        out = selective_scan(u, delta, A, B, C, delta_softplus=True, backend=backend)
        assert EMULATED or out.numel() > 2**31

        few = [cut(x).requires_grad_(training) for x in (u, delta)]
        expected = selective_scan(*few, A[LAST], B, C, delta_softplus=True, backend=backend)
    assert relative_error(cut(out), expected.detach()) < 1e-2
    if training:
        # What reaches the last channels is the same, whatever reaches the others.
        grads = torch.autograd.grad(out, (u, delta), out.detach())
        few_grads = torch.autograd.grad(expected, few, cut(out))
        for ours, theirs in zip(grads, few_grads, strict=True):
            assert relative_error(cut(ours), theirs) < 1e-2


@each_backend
@pytest.mark.parametrize('channels_last', [False, True])
def test_a_convolution_of_2_to_the_31_elements(backend, channels_last, room):
    room((6 if backend == 'cuda' else 8) * SEQUENCE)
    torch.manual_seed(0)
    x = sequence(channels_last).requires_grad_()
    weight = torch.randn(CHANNELS, 4, device=DEVICE)
    out = causal_conv1d(x, weight, backend=backend)
    few = cut(x).requires_grad_()
    expected = causal_conv1d(few, weight[LAST], backend=backend)
    assert relative_error(cut(out), expected.detach()) < 1e-2
    (grad,) = torch.autograd.grad(out, x, out.detach())
    (few_grad,) = torch.autograd.grad(expected, few, cut(out))
    assert relative_error(cut(grad), few_grad) < 1e-2
