"""The depthwise convolution on a GPU, with gradients, against the specification in float64."""

import random

import pytest
import torch
from gpu_cases import DTYPES, TOLERANCES, each_backend, each_case, size, to_device
from scan_cases import assert_accurate, to_double
from test_causal_conv1d import make_arguments, run
from test_gpu_scan import lay_out

from mmvim_ops import causal_conv1d
from mmvim_ops.naive import causal_conv1d_naive


def check(arguments, backend, given=None, **options):
    exact = run(causal_conv1d_naive, to_double(arguments), **options)
    plain = run(causal_conv1d_naive, arguments, **options)
    given = arguments if given is None else given
    actual = run(causal_conv1d, given, **options, backend=backend)
    assert_accurate(actual, plain, exact, TOLERANCES[arguments[0].dtype])


@each_case('seed', cuda=range(100))
def test_random_arguments(backend, seed):
    pick = random.Random(seed)
    arguments = make_arguments(
        batch=pick.choice([1, 2, 5]),
        channels=pick.choice([1, 3, 16, 35, 64, 384])
        if size(True, False)
        else pick.choice([3, 35]),
        length=pick.choice(size((1, 2, 64, 65, 131, 1000), (1, 2, 64, 65, 131))),
        taps=pick.randint(1, 32),
        channels_last=pick.random() < 0.5,
        bias=pick.random() < 0.5,
        dtype=DTYPES[seed % 3],
    )
    activation, reverse = pick.choice(['silu', None]), pick.random() < 0.5
    check(to_device(arguments), backend, activation=activation, reverse=reverse)


@each_case('taps', cuda=range(1, 33), triton=(4,))
@pytest.mark.parametrize('reverse', [False, True])
def test_any_number_of_taps(backend, taps, reverse):
    arguments = make_arguments(2, 64, size(300, 70), taps)
    check(to_device(arguments), backend, reverse=reverse)


@each_backend
@pytest.mark.parametrize('dtype', DTYPES)
def test_size_of_vim(backend, dtype):
    channels, length = size((768, 4096), (48, 130))
    check(to_device(make_arguments(4, channels, length, dtype=dtype)), backend)


@each_backend
@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('rows', ['channels', 'time'])
def test_rows_that_are_read_in_words_and_others(backend, rows, aligned):
    x, weight, bias = to_device(make_arguments(2, 72, 150, dtype=torch.bfloat16))
    check((x, weight, bias), backend, (lay_out(x, rows, aligned), weight, bias))


@each_backend
@pytest.mark.parametrize('shape', [(2, 4, 0), (0, 4, 5), (2, 0, 5)], ids=str)
def test_empty_input(backend, shape):
    arguments = to_device((torch.randn(shape), torch.randn(shape[1], 4)))
    result = run(causal_conv1d, arguments, backend=backend)
    assert result['out'].shape == shape
    assert result['weight'].abs().sum() == 0
