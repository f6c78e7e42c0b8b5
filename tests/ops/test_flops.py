"""torch counts the same for every backend: the paper's multiply-adds, two FLOPs each."""

import pytest
import torch
from scan_cases import CPU_BACKENDS, TENSORS, make_arguments
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import mmvim_ops.flops  # noqa: F401  (registers the formulas)
from mmvim_ops import (
    Direction,
    MixerDirection,
    bidirectional_selective_scan,
    causal_conv1d,
    mamba_mixer,
    scan_segment_,
    selective_scan,
)

ops = torch.ops.mmvim_ops
each_backend = pytest.mark.parametrize('backend', CPU_BACKENDS)
KERNELS = [*(name for name in ('cpp', 'cuda') if name in CPU_BACKENDS), 'triton']
BATCH, CHANNELS, LENGTH, STATES, TAPS = 2, 6, 20, 5, 4
ELEMENTS = BATCH * CHANNELS * LENGTH
SCAN, CONV = 8 * ELEMENTS * STATES, 2 * ELEMENTS * TAPS
SIZES = dict(batch=BATCH, channels=CHANNELS, length=LENGTH, states=STATES)


def count(function, *arguments, **more):
    """FLOPs of a call and of its backward pass."""
    with FlopCounterMode(display=False) as forward:
        out = function(*arguments, **more)
    out = out[0] if isinstance(out, tuple) else out
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def scan_arguments(device='cpu', **more):
    arguments = make_arguments(**SIZES, **more)
    return {
        name: x.to(device).requires_grad_() if isinstance(x, torch.Tensor) else x
        for name, x in arguments.items()
    }


def direction(arguments):
    return Direction(*(arguments[name] for name in (*TENSORS[:6], 'delta_bias')))


def test_every_operator_has_a_formula():
    # These compute nothing.
    queries = {'cpp_instruction_set', 'cpp_instruction_sets', 'cpp_mamba_mixer_tokens'}
    names = [name.split('::') for name in torch._C._dispatch_get_all_op_names()]
    ours = {name for library, name in names if library == 'mmvim_ops'} - queries
    assert {'torch_scan', 'cuda_conv1d_backward', 'triton_scan_backward'} <= ours
    assert [name for name in ours if getattr(ops, name) not in flop_registry] == []


@each_backend
@pytest.mark.parametrize(
    'case',
    [
        dict(),
        dict(groups_B=None, groups_C=0, reverse=True),
        dict(groups_B=3, groups_C=3, skip=False, gate=False, bias=False, softplus=False),
    ],
)
def test_a_scan_counts_four_products_and_twice_as_many_backward(backend, case):
    arguments = scan_arguments(**case)
    assert count(selective_scan, **arguments, backend=backend) == (SCAN, 2 * SCAN)


@each_backend
def test_two_directions_count_two_scans(backend):
    arguments = scan_arguments()
    given = (direction(arguments), direction(arguments), arguments['z'], True)
    counted = count(bidirectional_selective_scan, *given, backend=backend)
    assert counted == (2 * SCAN, 4 * SCAN)


@each_backend
def test_a_segment_of_a_sequence_counts_as_a_scan(backend):
    arguments = scan_arguments()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out, state = torch.zeros(BATCH, CHANNELS, LENGTH), torch.zeros(BATCH, CHANNELS, STATES)
        scan_segment_(out, state, direction(arguments), backend=backend)
    assert counter.get_total_flops() == SCAN


@each_backend
@pytest.mark.parametrize('reverse', [True, False])
def test_a_convolution_counts_its_taps(backend, reverse):
    x, weight = torch.randn(BATCH, CHANNELS, LENGTH), torch.randn(CHANNELS, TAPS)
    with FlopCounterMode(display=False) as counter:
        causal_conv1d(x, weight, reverse=reverse, backend=backend)
    assert counter.get_total_flops() == CONV


def mixer_arguments(directions):
    """Of :func:`mamba_mixer`, and the multiply-adds of a token."""
    width, inner, rank, states = 5, 6, 2, 3
    shapes = [(inner, TAPS), (inner,), (rank + 2 * states, inner), (inner, rank), (inner,)]
    one = MixerDirection(*map(torch.randn, shapes), -torch.rand(inner, states), torch.randn(inner))
    given = [one._replace(reverse=bool(i)) for i in range(directions)]
    products = directions * inner * (TAPS + 2 * rank + 2 * states + 4 * states)
    tokens = torch.randn(BATCH, LENGTH, width, requires_grad=True)
    weights = torch.randn(2 * inner, width), torch.randn(width, inner)
    return (tokens, weights[0], given, weights[1]), products + 3 * inner * width


@pytest.mark.parametrize('backend', CPU_BACKENDS)
@pytest.mark.parametrize('directions', [1, 2])
def test_a_mixer_counts_its_products(backend, directions):
    arguments, products = mixer_arguments(directions)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        mamba_mixer(*arguments, backend=backend)
    assert counter.get_total_flops() == 2 * BATCH * LENGTH * products


def test_the_mixers_operator_counts_twice_as_many_backward():
    if 'cpp' not in CPU_BACKENDS:
        pytest.skip('the cpp backend is not compiled')
    arguments, products = mixer_arguments(2)
    forward = 2 * BATCH * LENGTH * products
    assert count(mamba_mixer, *arguments) == (forward, 2 * forward)


def test_tensors_without_data_count_the_same():
    arguments = scan_arguments('meta')
    assert count(selective_scan, **arguments) == (SCAN, 2 * SCAN)
    with FlopCounterMode(display=False) as counter:
        causal_conv1d(arguments['u'], torch.empty(CHANNELS, TAPS, device='meta'))
    assert counter.get_total_flops() == CONV


# The operators of all compiled backends, on shapes alone: they need not be able to run here.


@pytest.mark.parametrize('kernels', KERNELS)
def test_scan_operators(kernels):
    arguments = list(scan_arguments('meta').values())
    assert count(getattr(ops, f'{kernels}_scan'), *arguments, True) == (SCAN, 2 * SCAN)


@pytest.mark.parametrize('kernels', [name for name in KERNELS if name != 'triton'])
def test_bidirectional_operators(kernels):
    arguments = scan_arguments('meta')
    given = (*direction(arguments), *direction(arguments), arguments['z'], True, 0.5, True)
    scan = getattr(ops, f'{kernels}_bidirectional_scan')
    assert count(scan, *given) == (2 * SCAN, 4 * SCAN)


@pytest.mark.parametrize('kernels', KERNELS)
def test_convolution_operators(kernels):
    arguments = scan_arguments('meta')
    weight = torch.empty(CHANNELS, TAPS, device='meta')
    conv1d = getattr(ops, f'{kernels}_conv1d')
    assert count(conv1d, arguments['u'], weight, None, True, False) == (CONV, 2 * CONV)
