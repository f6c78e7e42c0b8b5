"""Every backend against the goldens and against the naive specification."""

from functools import partial
from pathlib import Path

import pytest
import torch
from scan_cases import (
    CPU_BACKENDS,
    DOUBLE_BACKENDS,
    TENSORS,
    assert_same,
    make_arguments,
    random_arguments,
    relative_error,
    run,
    to_double,
)

from mmvim_ops import selective_scan
from mmvim_ops.backends.torch import scan as torch_scan
from mmvim_ops.naive import selective_scan_naive

GOLDENS = torch.load(
    Path(__file__).parents[1] / 'data/selective_scan_official.pt', weights_only=True
)
each_backend = pytest.mark.parametrize('backend', CPU_BACKENDS)


@each_backend
@pytest.mark.parametrize('case', GOLDENS)
def test_reproduces_the_official_reference(case, backend):
    golden = GOLDENS[case]
    inputs = {
        name: None if value is None else value.clone().requires_grad_()
        for name, value in golden['inputs'].items()
    }
    out, last_state = selective_scan(
        **inputs, delta_softplus=golden['delta_softplus'], return_last_state=True, backend=backend
    )
    assert relative_error(out.detach(), golden['out']) < 2e-4
    assert relative_error(last_state.detach(), golden['last_state']) < 2e-4
    out.backward(golden['grad_out'])
    for name in TENSORS:
        if inputs[name] is not None:
            assert relative_error(inputs[name].grad, golden['grads'][name]) < 2e-4, name


def test_the_specification_reproduces_the_official_reference():
    golden = GOLDENS['all_options']
    out = selective_scan_naive(**golden['inputs'], delta_softplus=golden['delta_softplus'])
    assert relative_error(out, golden['out']) < 1e-6


@each_backend
@pytest.mark.parametrize('first', range(0, 300, 50))
def test_agrees_with_the_specification_on_random_arguments(first, backend):
    for seed in range(first, first + 50):
        arguments = random_arguments(seed)
        expected = run(selective_scan_naive, arguments)
        actual = run(selective_scan, arguments, backend=backend)
        assert_same(
            actual, expected, 2e-5, partial(run, selective_scan_naive, to_double(arguments))
        )


@each_backend
def test_agrees_with_the_specification_where_one_tile_is_not_enough(backend, monkeypatch):
    monkeypatch.setattr(torch_scan, 'TILE', 1 << 12)
    arguments = make_arguments(batch=3, channels=80, length=390, states=5, groups_B=2, groups_C=2)
    expected = run(selective_scan_naive, arguments)
    assert_same(run(selective_scan, arguments, backend=backend), expected, 2e-5)


@each_backend
@pytest.mark.parametrize(
    'dtype, tolerance', [(torch.float64, 1e-12), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
def test_computes_in_float32_or_better_whatever_the_dtype(dtype, tolerance, backend):
    if dtype == torch.float64 and backend not in DOUBLE_BACKENDS:
        with pytest.raises(
            ValueError, match=f"backend '{backend}' takes .* but the input is .*float64"
        ):
            selective_scan(**make_arguments(dtype=dtype), backend=backend)
        return
    arguments = make_arguments(length=50, states=16, dtype=dtype)
    result = run(selective_scan, arguments, backend=backend)
    assert result['out'].dtype == dtype
    assert result['last_state'].dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert_same(result, run(selective_scan_naive, arguments), tolerance)


@each_backend
def test_reverse_is_flipping_scanning_and_flipping_back(backend):
    arguments = make_arguments(groups_B=3, groups_C=None, reverse=True)
    flipped = dict(arguments, reverse=False)
    for name in ('u', 'delta', 'B', 'z'):
        flipped[name] = arguments[name].flip(-1)
    out, last_state = selective_scan(**arguments, return_last_state=True, backend=backend)
    expected, expected_state = selective_scan(**flipped, return_last_state=True, backend=backend)
    torch.testing.assert_close(out, expected.flip(-1))
    torch.testing.assert_close(last_state, expected_state)


@each_backend
@pytest.mark.parametrize('reverse', [False, True])
def test_any_strides_give_the_same_result(reverse, backend):
    arguments = make_arguments(channels=8, length=33, reverse=reverse)
    expected = run(selective_scan, arguments, backend=backend)
    strided = dict(arguments)
    for name in ('u', 'delta', 'B', 'C', 'z'):
        value = arguments[name]
        wide = torch.full((*value.shape[:-2], value.shape[-1] + 3, 2 * value.shape[-2] + 1), 9e9)
        strided[name] = wide.transpose(-1, -2)[..., 1:-1:2, 2:-1].copy_(value)
    for name in ('D', 'delta_bias'):
        strided[name] = arguments[name].repeat_interleave(2)[::2]
    strided['A'] = arguments['A'].T.contiguous().T
    assert_same(run(selective_scan, strided, backend=backend), expected, 1e-6)


@each_backend
def test_expanded_arguments_work(backend):
    arguments = make_arguments(channels=8)
    arguments['u'] = torch.randn(2, 1, 20).expand(-1, 8, -1)
    arguments['z'] = torch.randn(8, 1).expand(2, 8, 20)
    arguments['A'] = -torch.rand(4).expand(8, 4)
    expected = run(selective_scan_naive, arguments)
    assert_same(run(selective_scan, arguments, backend=backend), expected, 2e-5)


@each_backend
@pytest.mark.parametrize('channels_last', [False, True])
def test_the_output_has_the_memory_layout_of_the_input(channels_last, backend):
    arguments = make_arguments(channels_last=channels_last)
    out = selective_scan(**arguments, backend=backend)
    assert out.stride() == arguments['u'].stride()


@pytest.mark.parametrize('backend', DOUBLE_BACKENDS)
def test_gradcheck_passes_in_double_precision(backend):
    for groups_B, groups_C, reverse in ((0, 0, False), (3, None, True), (None, 3, False)):
        arguments = make_arguments(
            batch=1,
            channels=3,
            length=5,
            states=3,
            groups_B=groups_B,
            groups_C=groups_C,
            reverse=reverse,
            dtype=torch.float64,
        )
        tensors = [arguments.pop(name).requires_grad_() for name in TENSORS]

        def scan(*tensors, settings=arguments):
            return selective_scan(*tensors, **settings, return_last_state=True, backend=backend)

        assert torch.autograd.gradcheck(scan, tensors)


@each_backend
@pytest.mark.parametrize('shape', [dict(length=0), dict(batch=0), dict(channels=0)])
def test_empty_input_gives_empty_output_and_zero_gradients(shape, backend):
    result = run(selective_scan, make_arguments(**shape), backend=backend)
    assert result['out'].numel() == 0
    assert result['last_state'].abs().sum() == 0
    assert all(result[f'grad of {name}'].abs().sum() == 0 for name in ('A', 'B', 'C'))


@each_backend
def test_length_one_is_one_step_of_the_recurrence(backend):
    ones = torch.ones(1, 1, 1)
    out = selective_scan(2 * ones, 3 * ones, -ones[0], 5 * ones, 7 * ones, backend=backend)
    assert out.item() == 3 * 2 * 5 * 7


@each_backend
@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('name', ['u', 'delta', 'A', 'B', 'z', 'D'])
def test_non_finite_input_goes_where_the_specification_sends_it(name, value, reverse, backend):
    arguments = make_arguments(length=40, groups_B=2, groups_C=2, reverse=reverse)
    arguments[name][(1,) if name == 'D' else (1, 1) if name == 'A' else (1, 1, ..., 17)] = value
    actual = run(selective_scan, arguments, with_gradients=False, backend=backend)
    expected = run(selective_scan_naive, arguments, with_gradients=False)
    for key in ('out', 'last_state'):
        assert torch.equal(actual[key].isfinite(), expected[key].isfinite()), key
        assert (
            not expected[key].isfinite().any()
            or relative_error(
                actual[key][expected[key].isfinite()], expected[key][expected[key].isfinite()]
            )
            < 2e-5
        )


@each_backend
def test_a_long_sequence_with_strong_decay_does_not_overflow(backend):
    arguments = make_arguments(batch=1, channels=2, length=3000, states=2)
    arguments['A'] = torch.tensor([[-1e-4, -1.0], [-1e2, -1e4]])
    expected = run(selective_scan_naive, arguments)
    assert_same(run(selective_scan, arguments, backend=backend), expected, 1e-4)
