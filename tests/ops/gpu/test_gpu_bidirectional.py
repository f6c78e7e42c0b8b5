"""Both directions in one call on a GPU, with gradients, against plain PyTorch in float64."""

import pytest
import torch
from gpu_cases import (
    DTYPES,
    USUAL,
    check_both,
    cuda_only,
    each_case,
    size,
    skip_if_too_large,
    to_device,
)
from scan_cases import make_arguments
from test_bidirectional import two_directions
from test_gpu_scan import LONG, SIZES, lay_out

from mmvim_ops import Direction
from mmvim_ops.backends.cuda import plan as cuda_plan


def vim_directions(gate=True, **fixed):
    """As the Vim block has them: equal flags, tensors of their own."""
    first, second = (make_arguments(**USUAL | fixed, seed=seed) for seed in (0, 1))
    forward, backward = (Direction(*(x[n] for n in Direction._fields)) for x in (first, second))
    return forward, backward, first['z'] if gate else None, True


def random_case(backend, seed):
    if backend == 'triton':
        dtype, length = DTYPES[seed % 2], size((99, 333, 901), (7, 9, 19))[seed // 2]
        return vim_directions(dtype=dtype, length=length, gate=seed % 2 == 0)
    length = dict(length=LONG[seed // 2 % 4]) if seed % 2 else {}
    return two_directions(seed, dtype=DTYPES[seed % 3], **length)


@each_case('seed', cuda=range(100), triton=range(6))
def test_random_arguments(backend, seed):
    check_both(to_device(random_case(backend, seed)), backend)


@each_case('seed', cuda=range(1000, 1020))
def test_random_arguments_in_many_chunks(backend, seed, chunks):
    arguments = two_directions(seed, length=LONG[seed % 4], dtype=DTYPES[seed % 3])
    check_both(to_device(arguments), backend)


@each_case('case', cuda=SIZES, triton=('384x1000-bfloat16-gate',))
def test_sizes_of_vim(backend, case):
    channels, length, dtype, gate = SIZES[case]
    shape = size(
        dict(batch=2, channels=channels, length=length),
        dict(batch=1, channels=channels // 8, length=length // 20 if backend == 'cuda' else 11),
    )
    fixed = shape | dict(channels_last=length == 1000, dtype=dtype, gate=gate)
    check_both(to_device(vim_directions(**fixed)), backend)


@cuda_only
@pytest.mark.parametrize('channels', [90, 384])
@pytest.mark.parametrize('warps', [1, 4])
@pytest.mark.parametrize('lanes', [2, 4, 8])
def test_blocks_of_any_size(backend, lanes, warps, channels, monkeypatch, cut, chunks):
    skip_if_too_large(16, 2, lanes, warps)
    cut(lanes=lanes, warps=warps)
    monkeypatch.setattr(cuda_plan, 'split_channels', lambda cut, sizes: 2)
    arguments = vim_directions(channels=channels, length=size(1000, 140))
    check_both(to_device(arguments), backend)


@cuda_only
@pytest.mark.parametrize('sizes', [((3, 2), (7, 3)), ((60, 1), (64, 0)), ((200, 0), (70, 0))])
def test_directions_may_differ_in_states_and_groups(backend, sizes):
    length = size(500, 70)
    first, second = (
        make_arguments(2, 12, length, states, groups_B=groups, groups_C=groups, seed=states)
        for states, groups in sizes
    )
    directions = [Direction(*(x[n] for n in Direction._fields)) for x in (first, second)]
    check_both(to_device((*directions, first['z'], True)), backend)


@cuda_only
@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('rows', ['channels', 'time'])
@pytest.mark.parametrize('dtype', DTYPES)
def test_rows_that_are_read_in_words_and_others(backend, dtype, rows, aligned, chunks):
    arguments = to_device(vim_directions(channels=72, length=size(600, 144), dtype=dtype))
    forward, backward, z, softplus = arguments
    given = [
        Direction(*(lay_out(x, rows, aligned) for x in direction))
        for direction in (forward, backward)
    ]
    check_both(arguments, backend, (*given, lay_out(z, rows, aligned), softplus))


@cuda_only
@pytest.mark.parametrize('channels, length', [(192, 6085), (8, 1300), (8, 410), (384, 3001)])
def test_few_channels_and_a_short_last_segment(backend, channels, length):
    """As the backend cuts them on a large GPU: both passes have to have the same chunks."""
    shape = size(dict(channels=channels, length=length), dict(channels=8, length=length // 10))
    check_both(to_device(vim_directions(**shape, batch=1)), backend)


@cuda_only
def test_views_of_one_projection(backend):
    """As in the Vim block: x and z are halves of one (batch, length, 2 · channels) tensor."""
    torch.manual_seed(0)
    length = size(1000, 140)
    x, z = to_device(torch.randn(2, length, 2 * 96)).mT.chunk(2, dim=1)
    _, B, C = to_device(torch.randn(2, length, 12 + 2 * 16)).mT.split([12, 16, 16], dim=1)
    A = to_device(-torch.rand(96, 16))
    direction = Direction(x, (x * 0.1).contiguous(), A, B, C)
    check_both((direction, direction, z, True), backend)
