"""Backend 'cuda': its kernels emulated on the CPU, and compiled by nvcc.

The tests that every backend has run in the emulation, too; see conftest.py. Those that run on a GPU
are in ../gpu.
"""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from scan_cases import (
    CPU_BACKENDS,
    TENSORS,
    assert_same,
    make_arguments,
    random_arguments,
    run,
    to_double,
)
from test_bidirectional import run as run_both
from test_bidirectional import specification, two_directions
from test_cuda_cut import random_sizes

from mmvim_ops import (
    Direction,
    bidirectional_selective_scan,
    causal_conv1d,
    selective_scan,
)
from mmvim_ops.backends import registry
from mmvim_ops.backends.cuda import cut as cuda_cut
from mmvim_ops.backends.cuda import library as cuda_library
from mmvim_ops.backends.cuda import plan as cuda_plan
from mmvim_ops.backends.cuda import scan as cuda_scan
from mmvim_ops.naive import causal_conv1d_naive, selective_scan_naive

sys.path.insert(0, str(Path(__file__).parents[3] / 'ops'))
import build_cuda
from build_emulation import build, find_compiler

emulated = pytest.mark.skipif('cuda' not in CPU_BACKENDS, reason='the kernels are not emulated')
ops = torch.ops.mmvim_ops


# In the emulation.


@pytest.mark.skipif(find_compiler() is None, reason='there is no C++ compiler')
def test_the_kernels_compile_for_the_emulation():
    assert build().exists()
    assert 'cuda' in CPU_BACKENDS


@emulated
def test_is_never_the_default_on_the_cpu():
    for dtype in (torch.float32, torch.bfloat16):
        assert registry.choose_backend(None, 'cpu', dtype).name != 'cuda'


@emulated
@pytest.mark.parametrize('first', range(0, 40, 10))
def test_chunks_agree_with_the_specification(first, chunks):
    for seed in range(first, first + 10):
        arguments = random_arguments(seed, batch=1 + seed % 2, length=[70, 128, 130, 200][seed % 4])
        expected = run(selective_scan_naive, arguments)
        actual = run(selective_scan, arguments, backend='cuda')
        assert_same(
            actual, expected, 2e-5, partial(run, selective_scan_naive, to_double(arguments))
        )


@emulated
@pytest.mark.parametrize('first', range(0, 20, 10))
def test_chunks_of_two_directions_agree_with_the_specification(first, chunks):
    for seed in range(first, first + 10):
        arguments = two_directions(seed, batch=1, length=[65, 128, 150, 200][seed % 4])
        expected = run_both(specification, *arguments, scale=0.5)
        actual = run_both(bidirectional_selective_scan, *arguments, scale=0.5, backend='cuda')
        assert_same(actual, expected, 2e-5)


@emulated
@pytest.mark.parametrize('groups', [0, None])
@pytest.mark.parametrize('states', [17, 64, 65, 256])
def test_many_states(states, groups):
    arguments = make_arguments(
        channels=5, length=70, states=states, groups_B=groups, groups_C=0, channels_last=True
    )
    expected = run(selective_scan_naive, arguments)
    assert_same(run(selective_scan, arguments, backend='cuda'), expected, 2e-5)


@emulated
@pytest.mark.parametrize('lanes', [2, 4, 8])
@pytest.mark.parametrize('warps', [1, 2, 4])
def test_blocks_of_any_size_and_split_channels(lanes, warps, monkeypatch, cut):
    """Backward blocks that take several sets of channels in turn, of which the last is short."""
    cut(lanes=lanes, warps=warps)
    monkeypatch.setattr(cuda_plan, 'split_channels', lambda cut, sizes: 2)
    arguments = make_arguments(channels=150, length=90, states=9, groups_B=0, groups_C=0)
    expected = run(selective_scan_naive, arguments)
    assert_same(run(selective_scan, arguments, backend='cuda'), expected, 2e-5)
    arguments = two_directions(1, batch=1, channels=90, length=40, groups_B=0, groups_C=0)
    actual = run_both(bidirectional_selective_scan, *arguments, backend='cuda')
    assert_same(actual, run_both(specification, *arguments), 2e-5)


@pytest.fixture
def h100(monkeypatch):
    """Scans are cut as for a GPU that wants many blocks; the emulation has two multiprocessors."""
    choose = cuda_plan.choose_cut
    monkeypatch.setattr(cuda_plan, 'limits', lambda device: (132, 227 * 1024))
    choose.cache_clear()
    yield
    choose.cache_clear()


def check_long_directions(channels, length):
    arguments = two_directions(
        2, batch=1, channels=channels, length=length, states=16, groups_B=0, groups_C=0
    )
    expected = run_both(specification, *arguments, scale=0.5)
    actual = run_both(bidirectional_selective_scan, *arguments, scale=0.5, backend='cuda')
    assert_same(actual, expected, 2e-5)


@emulated
def test_gradients_of_few_channels_on_a_large_gpu(h100):
    """In many chunks, of which the last is short and ends in a short segment."""
    sizes = cuda_plan.Sizes(2, 1, 1, 8, 1300, 16)
    forward, backward = (
        cuda_plan.choose_cut(sizes, torch.device('cpu'), which) for which in (False, True)
    )
    assert forward.chunks == backward.chunks > 1
    check_long_directions(8, 1300)


@emulated
@pytest.mark.parametrize('preferred', ['few', 'many'])
def test_gradients_where_backward_alone_would_take_other_chunks(preferred, monkeypatch, h100):
    """Where chunks end says where a reversed direction's saved states lie."""

    def cost(cut, sizes, device, backward):
        return cut.chunks if backward == (preferred == 'many') else -cut.chunks

    monkeypatch.setattr(cuda_cut, 'cost', cost)
    check_long_directions(8, 410)


@emulated
def test_passes_may_differ_in_lanes_and_warps(monkeypatch, h100):
    choose = cuda_plan.choose_cut

    def differently(sizes, device, backward):
        other = dict(lanes=8, warps=1) if backward else dict(lanes=4, warps=2)
        return choose(sizes, device, backward)._replace(**other)

    monkeypatch.setattr(cuda_plan, 'choose_cut', differently)
    for reverse in (False, True):
        arguments = make_arguments(1, 24, 500, 16, groups_B=0, groups_C=0, reverse=reverse)
        expected = run(selective_scan_naive, arguments)
        assert_same(run(selective_scan, arguments, backend='cuda'), expected, 2e-5)
    check_long_directions(24, 500)


@emulated
@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('rows', ['channels', 'time'])
@pytest.mark.parametrize(
    'dtype, tolerance', [(torch.float32, 2e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)]
)
def test_rows_that_are_read_in_words_and_others(dtype, tolerance, rows, aligned, chunks):
    """Whole tiles and short ones; B and C in rows of states or of time."""

    def lay_out(x):
        if not isinstance(x, torch.Tensor) or x.ndim < 3:
            return x
        x = x.mT if rows == 'channels' else x  # (..., rows)
        room = x.new_empty(*x.shape[:-1], x.shape[-1] + 8)
        x = room[..., slice(0, -8) if aligned else slice(1, -7)].copy_(x)
        return x.mT if rows == 'channels' else x

    given = make_arguments(
        channels=72, length=150, states=16, groups_B=0, groups_C=0, reverse=aligned, dtype=dtype
    )
    expected = run(selective_scan_naive, given)
    given = {name: lay_out(x) for name, x in given.items()}
    assert_same(run(selective_scan, given, backend='cuda'), expected, tolerance)

    directions = two_directions(
        3, batch=1, channels=64, length=144, states=16, groups_B=0, groups_C=0, dtype=dtype
    )
    expected = run_both(specification, *directions)
    forward, backward, z, softplus = directions
    forward, backward = (Direction(*map(lay_out, direction)) for direction in (forward, backward))
    actual = run_both(
        bidirectional_selective_scan, forward, backward, lay_out(z), softplus, backend='cuda'
    )
    assert_same(actual, expected, tolerance)


@emulated
@pytest.mark.parametrize('sizes', [((3, 2), (7, 3)), ((60, 1), (64, 0)), ((200, 0), (70, 0))])
def test_directions_may_differ_in_states_and_groups(sizes):
    first, second = (
        make_arguments(channels=12, states=states, groups_B=groups, groups_C=groups, seed=states)
        for states, groups in sizes
    )
    forward, backward = (Direction(*(x[n] for n in Direction._fields)) for x in (first, second))
    actual = run_both(bidirectional_selective_scan, forward, backward, first['z'], backend='cuda')
    assert_same(actual, run_both(specification, forward, backward, first['z']), 2e-5)


@emulated
@pytest.mark.parametrize('states, directions', [(16, 2), (64, 2), (65, 1), (256, 1)])
def test_the_smallest_blocks_fit_into_any_gpu(states, directions):
    assert directions == 1 or states <= cuda_scan.MOST_STATES_OF_TWO
    library = cuda_library.library('cpu')
    for backward in (False, True):  # 99 KiB: what a block may have on a consumer card
        assert library.mmvim_shared_bytes(states, 8, 1, directions, backward) <= 99 * 1024


@emulated
def test_dtypes_may_be_mixed():
    arguments = make_arguments(length=50, dtype=torch.bfloat16)
    for name in ('delta', 'C'):
        arguments[name] = arguments[name].float()
    expected = run(selective_scan_naive, arguments)
    assert_same(run(selective_scan, arguments, backend='cuda'), expected, 1e-2)


@emulated
@pytest.mark.parametrize('order', ['reverse', 'warps'])
@pytest.mark.parametrize('lanes, warps', [(4, 3), (8, 4)])
def test_the_order_of_threads_does_not_matter(order, lanes, warps, monkeypatch, cut):
    """Bit by bit: a missing barrier would show, as the emulation has no other order."""
    cut(lanes=lanes, warps=warps, chunks=2)
    arguments = make_arguments(channels=40, length=150, states=16, groups_B=0, groups_C=0)
    both = two_directions(4, channels=40, length=100, groups_B=0, groups_C=0)
    many = make_arguments(1, 9, 150, 40, groups_B=0, groups_C=0)
    x, weight = torch.randn(2, 40, 150), torch.randn(40, 4)

    def results():
        conv = causal_conv1d(x.requires_grad_(), weight, backend='cuda')
        return [
            *run(selective_scan, arguments, backend='cuda').values(),
            *run(selective_scan, many, backend='cuda').values(),
            *run_both(bidirectional_selective_scan, *both, backend='cuda').values(),
            conv,
            torch.autograd.grad(conv.sum(), x)[0],
        ]

    expected = results()
    monkeypatch.setenv('MMVIM_EMULATED_ORDER', order)
    for ours, theirs in zip(results(), expected, strict=True):
        assert torch.equal(ours, theirs)


@emulated
def test_offsets_have_64_bits():
    far = 2**31 + 8  # elements between two channels, and between two times
    memory = torch.empty(far + 64, dtype=torch.bfloat16)  # never touched, so never there
    arguments = make_arguments(batch=1, channels=2, length=20, dtype=torch.bfloat16)
    for shape, stride in (((1, 2, 20), (0, far, 1)), ((1, 20, 2), (0, 1, far))):
        given = dict(arguments)
        u = given['u'] if shape[1] == 2 else given['u'][..., :2].repeat(1, 10, 1)
        if shape[1] == 20:
            given = make_arguments(batch=1, channels=20, length=2, dtype=torch.bfloat16)
        given['u'] = memory.as_strided(shape, stride).copy_(u)
        expected = run(selective_scan_naive, given, with_gradients=False)
        actual = run(selective_scan, given, with_gradients=False, backend='cuda')
        assert_same(actual, expected, 1e-2)
        weight = torch.randn(shape[1], 4)
        torch.testing.assert_close(
            causal_conv1d(given['u'], weight, backend='cuda'),
            causal_conv1d_naive(given['u'], weight),
        )


@emulated
def test_padding_leaves_infinite_state_matrices_alone():
    arguments = make_arguments(length=5)
    arguments['A'][1, 1] = -torch.inf
    expected = run(selective_scan_naive, arguments, with_gradients=False)
    actual = run(selective_scan, arguments, with_gradients=False, backend='cuda')
    assert_same(actual, expected, 2e-5)


@emulated
@pytest.mark.parametrize(
    'case',
    [
        dict(length=150, groups_B=0, groups_C=0, channels_last=True),
        dict(groups_B=None, groups_C=3),
        dict(skip=False, gate=False, bias=False, softplus=False),
        dict(dtype=torch.bfloat16),
    ],
)
def test_opcheck(case):
    arguments = make_arguments(**case)
    tensors = [None if (x := arguments[name]) is None else x.requires_grad_() for name in TENSORS]
    torch.library.opcheck(ops.cuda_scan.default, (*tensors, True, False, True))
    *others, z, bias = tensors
    directions = (*others, bias, *others, bias, z)
    torch.library.opcheck(ops.cuda_bidirectional_scan.default, (*directions, True, 0.5, True))
    weight = torch.randn(6, 4).requires_grad_()
    torch.library.opcheck(ops.cuda_conv1d.default, (tensors[0], weight, bias, True, True))
    with torch.no_grad():
        torch.library.opcheck(ops.cuda_scan.default, (*tensors, False, True, False))


# How it is cut, built and found.


@emulated
def test_blocks_on_a_large_gpu_fit_and_both_passes_have_the_same_chunks(h100):
    library = cuda_library.library('cpu')
    for seed in range(200):
        sizes = random_sizes(seed)
        cuts = [cuda_plan.choose_cut(sizes, torch.device('cpu'), which) for which in (False, True)]
        assert cuts[0].chunks == cuts[1].chunks, sizes
        for backward, (lanes, warps, _) in enumerate(cuts):
            used = library.mmvim_shared_bytes(
                sizes.states, lanes, warps, sizes.directions, backward
            )
            assert used <= 227 * 1024
            threads = warps * sizes.directions * 32
            assert threads <= library.mmvim_most_threads(sizes.states, lanes, backward)


def test_a_gpu_without_the_library_gets_triton_silently_and_torch_with_a_warning(
    monkeypatch, recwarn
):
    found = {'cuda': 'not compiled', 'triton': None}
    for name in found:
        monkeypatch.setattr(registry.BACKENDS[name], 'missing', lambda name=name: found[name])
    monkeypatch.setattr(registry, '_warned', set())
    assert registry.choose_backend(None, 'cuda').name == 'triton'
    assert not recwarn.list
    found['triton'] = 'not installed'
    assert registry.choose_backend(None, 'cuda').name == 'torch'
    assert "'cuda' is missing: not compiled" in str(recwarn.pop().message)
    found['cuda'] = None
    assert registry.choose_backend(None, 'cuda').name == 'cuda'
    assert registry.choose_backend(None, 'cuda', torch.float64).name == 'torch'


def test_architectures_are_those_of_torch():
    assert build_cuda.architecture_flags('8.0;9.0a+PTX') == [
        '-gencode=arch=compute_80,code=sm_80',
        '-gencode=arch=compute_90a,code=sm_90a',
        '-gencode=arch=compute_90a,code=compute_90a',
    ]
    with pytest.raises(ValueError, match="'8.0;9.0.PTX', got 'Hopper'"):
        build_cuda.architecture_flags('Hopper')


@pytest.mark.skipif(build_cuda.find_nvcc() is None, reason='there is no nvcc')
@pytest.mark.slow
def test_compiles_and_fits_into_the_registers(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_CUDA_ARCH_LIST', '8.0;9.0')
    target = tmp_path / '_cuda.so'
    said = build_cuda.build(target, True, ('-DMMVIM_ONLY_BFLOAT16',))
    lines = build_cuda.kernels(said)
    for gpu in ('sm_80', 'sm_90'):
        for name in ('chunk_ends', 'carry', 'scan_forward', 'scan_backward', 'conv_backward'):
            assert any(line.startswith(f'{gpu} {name}<') for line in lines), (gpu, name)
        assert any(line.startswith(f'{gpu} finish ') for line in lines), gpu
    for line in lines:  # 180 bytes in `scan_backward` on sm_90, 252 on sm_80, of 672 of registers
        assert int(line.split('spilled')[1].split()[0]) <= 256, line
    assert not isinstance(cuda_library._load(target), str)
