"""Backend 'cuda' on the host's side: what is called for one scan, and the sums of its gradients.

In the emulation; see conftest.py.
"""

import ctypes
import struct

import pytest
import torch
from scan_cases import CPU_BACKENDS, TENSORS, assert_same, make_arguments, relative_error, run

from mmvim_ops import Direction, bidirectional_selective_scan, causal_conv1d, selective_scan
from mmvim_ops.backends.cuda import plan as cuda_plan
from mmvim_ops.backends.cuda import structures
from mmvim_ops.naive import causal_conv1d_naive, selective_scan_naive

pytestmark = pytest.mark.skipif('cuda' not in CPU_BACKENDS, reason='the kernels are not emulated')


def trained(*tensors):
    return [None if x is None else x.detach().requires_grad_() for x in tensors]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('batch, channels, taps', [(1, 8, 4), (40, 8, 4), (40, 5, 4), (3, 33, 7)])
def test_sums_of_the_convolution(batch, channels, taps, dtype):
    """One row and many, in words and not, into any dtype."""
    x = torch.randn(batch, channels, 130)
    weight, bias = torch.randn(channels, taps).to(dtype), torch.randn(channels).to(dtype)
    grad = torch.randn(batch, channels, 130)
    given = trained(x, weight, bias)
    expected = torch.autograd.grad(causal_conv1d_naive(*given), given, grad)
    actual = torch.autograd.grad(causal_conv1d(*given, backend='cuda'), given, grad)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, theirs) < (2e-5 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize('splits', [1, 3])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('states, groups', [(4, 0), (5, 2), (3, None)])
def test_sums_of_the_scan(states, groups, dtype, splits, monkeypatch, cut):
    """Over blocks, batch and chunks, into the dtype of each argument."""
    cut(lanes=8, warps=1, chunks=1000)
    monkeypatch.setattr(cuda_plan, 'split_channels', lambda cut, sizes: splits)
    arguments = make_arguments(
        channels=100, length=130, states=states, groups_B=groups, groups_C=groups
    )
    for name in ('A', 'B', 'C', 'D', 'delta_bias'):
        arguments[name] = arguments[name].to(dtype)
    expected = run(selective_scan_naive, arguments)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-2
    assert_same(run(selective_scan, arguments, backend='cuda'), expected, tolerance)


def test_scans_of_one_size_share_a_plan(cut):
    arguments = make_arguments(length=200)
    direction = Direction(*(arguments[name] for name in Direction._fields))

    def find(backward=True):
        return cuda_plan.find_plan([direction], torch.float32, True, backward)

    cut(chunks=1)
    before = find()
    assert find() is before
    assert find(backward=False) is not before
    cut(chunks=2)
    assert (before.chunks, find().chunks) == (1, 2)


def called(function):
    """Names of what torch was asked for."""
    with torch.autograd.profiler.profile() as profile:
        function()
    return {event.name for event in profile.function_events}


def test_torch_computes_nothing():
    """What fits is neither cast nor copied; nobody makes zeros for gradients that are not there."""
    arguments = make_arguments(groups_B=0, groups_C=0, dtype=torch.bfloat16)
    one = trained(*(arguments[name] for name in TENSORS))
    *others, z, bias = one
    both = [trained(*others, bias) for _ in range(2)]
    conv = trained(torch.randn(2, 6, 70), torch.randn(6, 4), torch.randn(6))

    def compute():
        out = bidirectional_selective_scan(*both, z, True, backend='cuda')
        torch.autograd.grad(out, [*both[0], *both[1], z], torch.empty_like(out))
        out = selective_scan(*one, True, backend='cuda')
        torch.autograd.grad(out, one, torch.empty_like(out))
        out = causal_conv1d(*conv, backend='cuda')
        torch.autograd.grad(out, conv, torch.empty_like(out))

    compute()
    names = called(compute)
    assert 'mmvim_ops::cuda_bidirectional_scan' in names
    views_and_memory = {'empty', 'empty_like', 'empty_strided', 'new_empty', 'transpose'}
    views_and_memory |= {'as_strided', 'slice', 'detach', 'numpy_T', 'mT'}
    found = {name.removeprefix('aten::') for name in names if name.startswith('aten::')}
    assert found <= views_and_memory, found - views_and_memory


def test_structures_are_filled_in_the_order_of_their_fields():
    size = ctypes.sizeof(structures.Scan) // 8
    scan = structures.filled(structures.Scan, range(size))
    assert (scan.dtype, scan.splits, scan.scale, scan.z.data) == (0, 14, 15.0, 16)
    assert scan.direction[1].grad_delta_bias == size - 1
    totals = structures.filled(structures.Totals * 2, range(20))
    assert (totals[0].C.dtype, totals[1].B.data) == (3, 10)
    with pytest.raises(struct.error):
        structures.filled(structures.Scan, range(size - 1))
