"""The convolution of backend 'cuda' for every layout that its kernels tell apart, emulated on the
CPU, and on a GPU where there is one."""

import random

import pytest
import torch
from scan_cases import CPU_BACKENDS, assert_same

from mmvim_ops import causal_conv1d
from mmvim_ops.backends.cuda import library as cuda_library
from mmvim_ops.backends.cuda.conv1d import conv1d_pair
from mmvim_ops.naive import causal_conv1d_naive

DEVICES = ['cpu'] if 'cuda' in CPU_BACKENDS else []
if torch.cuda.is_available() and not isinstance(cuda_library._compiled, str):
    DEVICES.append('cuda')
pytestmark = pytest.mark.skipif(not DEVICES, reason='there is neither a C++ compiler nor a GPU')
each_device = pytest.mark.parametrize('device', DEVICES)

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
LAYOUTS = ('channels last', 'half of the channels', 'odd offset', 'odd rows', 'time last')
# Around the runs of threads and the tiles of blocks.
LENGTHS = (1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 61, 63, 64, 65, 67, 68, 127, 128, 129, 131, 200)


def make_sequence(batch, channels, length, layout, dtype, device):
    """(B, D, L), random, in a layout that has a name."""
    if layout == 'time last':
        return torch.randn(batch, channels, length, device=device).to(dtype)
    width = {'half of the channels': 2 * channels, 'odd rows': channels + 1}.get(layout, channels)
    offset = layout == 'odd offset'
    memory = torch.randn(batch * length * width + offset, device=device).to(dtype)
    rows = memory[int(offset) :].view(batch, length, width)[..., :channels]
    return rows.transpose(1, 2)


def make_parameters(channels, taps, bias, odd, device):
    """Weight and bias, or None; with an odd address they are not whole vectors."""

    def parameter(*shape):
        numbers = torch.randn(torch.Size(shape).numel() + odd, device=device)
        return numbers[int(odd) :].view(shape)

    return parameter(channels, taps), parameter(channels) if bias else None


def run(function, given, grad_out, **options):
    given = [x.detach().requires_grad_() for x in given if x is not None]
    out = function(*given, **options)
    grads = torch.autograd.grad(out, given, grad_out)
    return dict(zip(('out', 'x', 'weight', 'bias'), (out, *grads), strict=False))


def assert_agrees(x, parameters, grad_out, **options):
    given = x, *parameters
    expected = run(causal_conv1d_naive, given, grad_out, **options)
    actual = run(causal_conv1d, given, grad_out, **options, backend='cuda')
    assert_same(actual, expected, TOLERANCES[x.dtype])


@each_device
@pytest.mark.parametrize('first', range(0, 120, 20))
def test_any_layout_and_length_agrees_with_the_specification(first, device):
    for seed in range(first, first + 20):
        choose = random.Random(seed)
        torch.manual_seed(seed)
        sizes = choose.choice((1, 2, 3)), choose.choice((4, 8, 9, 12, 24, 64, 72, 100, 136))
        length, dtype = choose.choice(LENGTHS), choose.choice(list(TOLERANCES))
        # Half of them in the layout of a model's block.
        layouts = [choose.choice(LAYOUTS) if seed % 2 else LAYOUTS[0] for _ in range(2)]
        x, grad_out = (make_sequence(*sizes, length, name, dtype, device) for name in layouts)
        taps = choose.choice((1, 3, 4, 4, 4, 4, 7))
        parameters = make_parameters(
            *(sizes[1], taps, choose.random() < 0.7, choose.random() < 0.2), device
        )
        activation, reverse = choose.choice(('silu', None)), choose.random() < 0.5
        assert_agrees(x, parameters, grad_out, activation=activation, reverse=reverse)


@each_device
@pytest.mark.parametrize('reverse', [False, True])
def test_more_blocks_than_a_gpu_has_room_for_have_longer_runs(reverse, device):
    torch.manual_seed(0)
    for dtype, length in ((torch.float32, 19), (torch.bfloat16, 7)):
        x, grad_out = (
            make_sequence(1030, 8, length, 'channels last', dtype, device) for _ in range(2)
        )
        assert_agrees(x, make_parameters(8, 4, True, False, device), grad_out, reverse=reverse)
    x, grad_out = (
        make_sequence(520, 8, 70, 'channels last', torch.float32, device) for _ in range(2)
    )
    assert_agrees(x, make_parameters(8, 4, True, False, device), grad_out, reverse=reverse)


@each_device
@pytest.mark.parametrize(
    'layout, batch', [*((layout, 2) for layout in LAYOUTS), (LAYOUTS[0], 1030)]
)
def test_two_convolutions_of_one_input_equal_each_alone(layout, batch, device):
    torch.manual_seed(0)
    for dtype, length, reverse, other in (
        (torch.float32, 37, False, True),
        (torch.bfloat16, 66, True, False),
        (torch.float16, 1, False, True),
        (torch.bfloat16, 9, True, True),
        (torch.float32, 3, False, False),
    ):
        if batch > 2 and length > 9:
            length = 9
        x = make_sequence(batch, 16, length, layout, dtype, device)
        first = *make_parameters(16, 4, True, False, device), reverse
        second = *make_parameters(16, 4, length != 37, False, device), other
        for silu in (True, False):
            outs = conv1d_pair(x, first, second, silu)
            for out, (weight, bias, backwards) in zip(outs, (first, second), strict=True):
                activation = 'silu' if silu else None
                options = dict(reverse=backwards, activation=activation)
                alone = causal_conv1d(x, weight, bias, **options, backend='cuda')
                assert torch.equal(out, alone)
                expected = causal_conv1d_naive(x, weight, bias, **options)
                assert_same(dict(out=out), dict(out=expected), TOLERANCES[dtype])


@each_device
def test_two_convolutions_take_any_taps_and_nothing(device):
    x = make_sequence(2, 8, 20, 'channels last', torch.float32, device)
    first, second = ((*make_parameters(8, 3, True, False, device), way) for way in (False, True))
    for out, (weight, bias, reverse) in zip(
        conv1d_pair(x, first, second, True), (first, second), strict=True
    ):
        expected = causal_conv1d_naive(x, weight, bias, reverse=reverse)
        torch.testing.assert_close(out, expected)
    for out in conv1d_pair(x[..., :0], first, second, True):
        assert out.shape == (2, 8, 0)


@each_device
@pytest.mark.parametrize('reverse', [False, True])
def test_what_overflows_past_the_end_does_not_reach_gradients(reverse, device):
    x = make_sequence(1, 8, 9, 'channels last', torch.float32, device)
    weight = torch.tensor([4.0, 1e-38, 1e-38, 0]).repeat(8, 1).to(device)
    x[..., 0 if reverse else -1] = 2e38  # times the weight of three steps later
    grad_out = 0.1 * torch.ones_like(x)
    grads = run(causal_conv1d, (x, weight), grad_out, reverse=reverse, backend='cuda')
    expected = run(causal_conv1d_naive, (x, weight), grad_out, reverse=reverse)
    assert all(grad.isfinite().all() for grad in grads.values())
    torch.testing.assert_close(grads['x'], expected['x'])


@pytest.mark.skipif('cpu' not in DEVICES, reason='the kernels are not emulated')
def test_the_order_of_threads_does_not_matter_with_channels_last(monkeypatch):
    x, grad_out = (
        make_sequence(2, 72, 150, 'channels last', torch.float32, 'cpu') for _ in range(2)
    )
    given = x, *make_parameters(72, 4, True, False, 'cpu')
    expected = run(causal_conv1d, given, grad_out, backend='cuda')
    monkeypatch.setenv('MMVIM_EMULATED_ORDER', 'reverse')
    for name, result in run(causal_conv1d, given, grad_out, backend='cuda').items():
        assert torch.equal(result, expected[name])


@pytest.mark.skipif('cpu' not in DEVICES, reason='the kernels are not emulated')
def test_offsets_between_times_have_64_bits():
    far = 2**31 + 8  # elements
    memory = torch.empty(far + 64, dtype=torch.bfloat16)  # never touched, so never there
    x = memory.as_strided((1, 16, 2), (0, 1, far)).copy_(torch.randn(1, 16, 2))
    weight = torch.randn(16, 4)
    for reverse in (False, True):
        torch.testing.assert_close(
            causal_conv1d(x, weight, reverse=reverse, backend='cuda'),
            causal_conv1d_naive(x, weight, reverse=reverse),
        )
