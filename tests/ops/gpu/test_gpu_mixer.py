"""The whole mixer on a GPU, with all gradients, against the specification in float64."""

import random

import pytest
import torch
from gpu_cases import DEVICE, assert_equal, cuda_only, each_backend, each_case, size, to_device
from scan_cases import assert_accurate, map_tensors, to_double
from test_mamba_mixer import make_mixer, results

from mmvim_ops import MixerDirection, mamba_mixer
from mmvim_ops.naive import mamba_mixer_naive

each_recompute = pytest.mark.parametrize('recompute', ['activations', 'all', 'none'])


def leaves(x):
    return map_tensors(lambda t: t.detach().requires_grad_(t.is_floating_point()), x)


def mixer(seed, length, **fixed):
    return leaves(to_device(make_mixer(seed, length, dtype=torch.float32, **fixed)))


def numbered(found):
    return {f'result {index}': x for index, x in enumerate(found)}


def check(case, backend, tolerance=1e-4, **more):
    """Compare with float64; where the mixer is under autocast, so is that by plain PyTorch."""
    with torch.autocast(DEVICE, enabled=False):
        exact = results(mamba_mixer_naive, *leaves(to_double(case)))
    plain = results(mamba_mixer, *case, backend='torch', **more)
    actual = results(mamba_mixer, *case, backend=backend, **more)
    assert_accurate(*map(numbered, (actual, plain, exact)), tolerance)


@each_case('seed', cuda=range(12), triton=(6,))
@each_recompute
def test_equals_the_specification(backend, seed, recompute):
    length = 9 if backend == 'triton' else random.Random(seed).choice([1, 2, 23, size(197, 70)])
    check(mixer(seed, length), backend, recompute=recompute)


@each_recompute
@each_backend
def test_a_block_of_vim(backend, recompute):
    sizes = size(dict(dims=192, inner=384), dict(dims=12, inner=24))
    case = mixer(6, size(197, 20), kind=2, **sizes)
    check(case, backend, recompute=recompute)


@each_recompute
@each_backend
def test_autocast(backend, recompute):
    case = mixer(6, size(197, 20), kind=2)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert mamba_mixer(case[0], *case[1], **case[2], backend=backend).dtype == torch.bfloat16
        check(case, backend, tolerance=2e-2, recompute=recompute)


@cuda_only
def test_an_order_of_reading(backend):
    tokens, (into, directions, out), more = mixer(3, 15, kind=2)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    directions[1] = MixerDirection(*directions[1])._replace(order=order)
    check((tokens, (into, directions, out), more), backend)


@each_backend
def test_recomputed_or_not_the_results_are_the_same(backend):
    case = mixer(6, size(197, 20), kind=2)
    stored = results(mamba_mixer, *case, backend=backend, recompute='none')
    for recompute in ('activations', 'all'):
        assert_equal(results(mamba_mixer, *case, backend=backend, recompute=recompute), stored)
