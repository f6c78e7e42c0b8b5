"""The whole mixer on a GPU, with all gradients, against the specification in float64."""

import random

import pytest
import torch
from gpu_cases import DEVICE, assert_equal, cuda_only, each_backend, each_case, size, to_device
from scan_cases import assert_accurate, map_tensors, to_double
from test_mamba_mixer import assert_close, make_mixer, results

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


on_gpu = pytest.mark.skipif(DEVICE == 'cpu', reason='the emulation has neither launches nor graphs')


@on_gpu
@cuda_only
def test_launches_of_a_block(backend):
    tokens, arguments, more = mixer(6, 197, kind=2, dims=192, inner=384)
    more = dict(more, norm_weight=torch.ones(192, device=DEVICE))

    @torch.no_grad()
    def infer():
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            mamba_mixer(tokens, *arguments, **more, backend=backend)

    infer()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        infer()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    names = [event.name for event in profile.events() if event.device_type == cuda]
    # More than one chunk takes passes of its own, and cuBLAS may split a product into two launches.
    names = [n for n in names if not any(part in n for part in ('chunk_ends', 'carry', 'splitK'))]
    assert 0 < len(names) <= 9, names


@on_gpu
@cuda_only
@each_recompute
def test_a_captured_graph_follows_the_weights(backend, recompute):
    """Under autocast, in place: a replay reads the weights, not casts of before."""
    tokens, (into, directions, out), more = mixer(6, 197, kind=2)
    weights = into, out, *(o.x_proj_weight for o in directions)

    def step():
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            y = mamba_mixer(
                *(tokens, into, directions, out), **more, recompute=recompute, backend=backend
            )
        return y, *torch.autograd.grad(y, [tokens, *weights], torch.ones_like(y))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for weight in weights:
        weight.data.mul_(2)
    graph.replay()
    assert_close(captured, step(), 1e-2)
