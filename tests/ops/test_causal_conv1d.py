"""The depthwise causal convolution against its specification."""

import itertools
from functools import partial

import pytest
import torch
from scan_cases import CPU_BACKENDS, DOUBLE_BACKENDS, assert_same, to_double, upstream

from mmvim_ops import causal_conv1d
from mmvim_ops.naive import causal_conv1d_naive

MOST_TAPS = {name: most for name, most in (('cpp', 8), ('cuda', 32)) if name in CPU_BACKENDS}
ANY_TAPS = [name for name in CPU_BACKENDS if name not in MOST_TAPS]
each_backend = pytest.mark.parametrize('backend', CPU_BACKENDS)


def make_arguments(
    batch=2, channels=20, length=30, taps=4, channels_last=True, bias=True, dtype=torch.float32
):
    torch.manual_seed(channels + length + taps)
    x = (
        torch.randn(batch, length, channels, dtype=dtype).transpose(1, 2)
        if channels_last
        else torch.randn(batch, channels, length, dtype=dtype)
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        x,
        torch.randn(channels, taps, dtype=wide),
        torch.randn(channels, dtype=wide) if bias else None,
    )


def run(function, arguments, **more):
    given = [x.detach().requires_grad_() for x in arguments if x is not None]
    out = function(*given, **more)
    torch.manual_seed(1)
    grads = torch.autograd.grad(out, given, upstream(out))
    return dict(zip(('out', 'x', 'weight', 'bias'), (out, *grads), strict=False))


@each_backend
@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('activation', ['silu', None])
def test_agrees_with_the_specification(activation, reverse, backend):
    for channels, length, taps, channels_last, bias in itertools.product(
        (1, 16, 35), (1, 2, 64, 131), (1, 4, 8), (False, True), (False, True)
    ):
        arguments = make_arguments(2, channels, length, taps, channels_last, bias)
        options = dict(reverse=reverse, activation=activation)
        assert_same(
            run(causal_conv1d, arguments, **options, backend=backend),
            run(causal_conv1d_naive, arguments, **options),
            2e-5,  # a channel's sum over time may cancel, and the specification be lucky
            partial(run, causal_conv1d_naive, to_double(arguments), **options),
        )


@pytest.mark.parametrize('backend', [None, *ANY_TAPS])
def test_any_number_of_taps_is_taken(backend):
    arguments = make_arguments(taps=33)
    expected = run(causal_conv1d_naive, arguments)
    assert_same(run(causal_conv1d, arguments, backend=backend), expected, 1e-5)


@pytest.mark.parametrize('backend', MOST_TAPS)
def test_more_taps_than_its_kernel_has_are_refused_by_a_backend(backend):
    most = MOST_TAPS[backend]
    causal_conv1d(*make_arguments(taps=most), backend=backend)
    with pytest.raises(
        ValueError, match=f"'{backend}' takes at most {most} taps, but .* {most + 1}"
    ):
        causal_conv1d(*make_arguments(taps=most + 1), backend=backend)


@each_backend
def test_equals_a_padded_depthwise_conv1d_and_takes_its_weight(backend):
    conv = torch.nn.Conv1d(8, 8, 4, groups=8, padding=3)
    x = torch.randn(2, 8, 11)
    expected = torch.nn.functional.silu(conv(x)[..., :11])
    torch.testing.assert_close(causal_conv1d(x, conv.weight, conv.bias, backend=backend), expected)


@each_backend
@pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_low_precision_is_computed_in_float32(dtype, tolerance, backend):
    arguments = make_arguments(dtype=dtype)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert_same(
            run(causal_conv1d, arguments, backend=backend),
            run(causal_conv1d_naive, arguments),
            tolerance,
        )


@pytest.mark.parametrize('backend', DOUBLE_BACKENDS)
def test_gradcheck_passes_in_double_precision(backend):
    arguments = make_arguments(2, 3, 7, dtype=torch.float64)
    for x in arguments:
        x.requires_grad_()
    for reverse in (False, True):
        assert torch.autograd.gradcheck(
            lambda *a, r=reverse: causal_conv1d(*a, reverse=r, backend=backend), arguments
        )


@each_backend
@pytest.mark.parametrize('channels_last', [False, True])
def test_the_output_has_the_memory_layout_of_the_input(channels_last, backend):
    x, weight, bias = make_arguments(channels_last=channels_last)
    assert causal_conv1d(x, weight, bias, backend=backend).stride() == x.stride()


@each_backend
@pytest.mark.parametrize('shape', [(2, 4, 0), (0, 4, 5), (2, 0, 5)])
def test_empty_input_gives_empty_output(shape, backend):
    result = run(causal_conv1d, (torch.randn(shape), torch.randn(shape[1], 4)), backend=backend)
    assert result['out'].shape == shape
    assert result['weight'].abs().sum() == 0


@each_backend
def test_a_nan_reaches_only_the_steps_that_see_it(backend):
    x, weight, bias = make_arguments()
    x[1, 3, 7] = float('nan')
    out = causal_conv1d(x, weight, bias, backend=backend)
    assert out[1, 3, 7:11].isnan().all()
    assert out.isnan().sum() == 4


@pytest.mark.parametrize(
    'change, error, message',
    [
        (dict(x=torch.randn(4, 9)), ValueError, 'x must have 3 dimensions'),
        (dict(weight=torch.randn(5, 4)), ValueError, r'weight must .* 20 channels.*\(5, 4\)'),
        (dict(weight=torch.randn(20, 2, 4)), ValueError, 'weight must have shape'),
        (dict(weight=torch.randn(20, 4).double()), TypeError, 'weight is torch.float64 and x is'),
        (dict(bias=torch.randn(1)), ValueError, 'bias must have shape'),
        (dict(activation='relu'), ValueError, "activation must be 'silu' or None, got 'relu'"),
    ],
)
def test_a_bad_argument_is_named(change, error, message):
    x, weight, bias = make_arguments()
    with pytest.raises(error, match=message):
        causal_conv1d(**{**dict(x=x, weight=weight, bias=bias), **change})
