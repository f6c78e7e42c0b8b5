"""What only the compiled CPU backend has: instruction sets, threads, its memory."""

import pytest
import torch
from scan_cases import CPU_BACKENDS, assert_same, make_arguments, random_arguments, run

from mmvim_ops import Direction, bidirectional_selective_scan, causal_conv1d, selective_scan
from mmvim_ops.naive import causal_conv1d_naive, selective_scan_naive

if 'cpp' not in CPU_BACKENDS:
    pytest.skip('the cpp backend is not compiled', allow_module_level=True)
ops = torch.ops.mmvim_ops
INSTRUCTION_SETS = ops.cpp_instruction_sets()


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request):
    before = ops.cpp_instruction_set()
    yield ops.cpp_instruction_set(request.param)
    ops.cpp_instruction_set(before)


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_the_best_instruction_set_is_the_default():
    assert ops.cpp_instruction_set() == INSTRUCTION_SETS[0]
    with pytest.raises(RuntimeError, match='instruction set must be one of .*portable.*got mmx'):
        ops.cpp_instruction_set('mmx')


def test_every_instruction_set_agrees_with_the_specification(instruction_set):
    for seed in range(1000, 1060):
        arguments = random_arguments(seed)
        assert_same(
            run(selective_scan, arguments, backend='cpp'),
            run(selective_scan_naive, arguments),
            2e-5,
        )
    for channels_last in (False, True):
        arguments = make_arguments(
            channels=37,
            length=450,
            states=16,
            groups_B=0,
            groups_C=0,
            channels_last=channels_last,
            reverse=channels_last,
        )
        assert_same(
            run(selective_scan, arguments, backend='cpp'),
            run(selective_scan_naive, arguments),
            2e-5,
        )


def test_every_instruction_set_convolves(instruction_set):
    x, weight = torch.randn(2, 200, 37).transpose(1, 2), torch.randn(37, 4)
    for value in (x, x.contiguous()):
        torch.testing.assert_close(
            causal_conv1d(value, weight, backend='cpp'), causal_conv1d_naive(value, weight)
        )


def test_any_number_of_threads_gives_the_same_result(threads):
    for batch, channels in ((1, 100), (3, 20), (7, 3)):
        arguments = make_arguments(batch, channels, 70, 8, 0, 0)
        assert_same(
            run(selective_scan, arguments, backend='cpp'),
            run(selective_scan_naive, arguments),
            2e-5,
        )


def through_delta(x):
    """Softplus as the kernel computes it: y = Δ with A = 0, B = C = u = 1 and one step."""
    one = torch.ones(1, x.numel(), 1)
    return selective_scan(
        one,
        x.view(1, -1, 1),
        torch.zeros(x.numel(), 1),
        one[:, :1],
        one[:, :1],
        delta_softplus=True,
        backend='cpp',
    ).flatten()


def test_softplus_has_a_relative_error_below_1e_6(instruction_set):
    x = torch.linspace(-80, 80, 200_001)
    expected = torch.nn.functional.softplus(x.double(), threshold=1000)
    assert ((through_delta(x).double() - expected) / expected).abs().max() < 1e-6


def test_exp_has_an_error_below_1e_6(instruction_set):
    """exp(Δ A) as it decays a state of one: h_1 = exp(A) with Δ = (1, 1) and u = (1, 0)."""
    A = torch.linspace(-80, 0, 200_001)[:, None]
    u = torch.tensor([1.0, 0.0]).expand(1, len(A), 2)
    one = torch.ones(1, 1, 2)
    y = selective_scan(u, torch.ones_like(u), A, one, one, backend='cpp')[0, :, 1]
    expected = A[:, 0].double().exp()
    assert (y - expected).abs().max() < 2e-7
    assert ((y - expected) / expected)[A[:, 0] > -10].abs().max() < 1e-6


def test_forward_needs_no_memory_besides_its_output():
    arguments = make_arguments(1, 64, 1024, 16, 0, 0, channels_last=True)
    size = arguments['u'].numel() * 4

    def peak(**more):
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            selective_scan(**arguments, **more, backend='cpp')
        used = most = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == '[memory]':
                used += event.nbytes()
                most = max(most, used)
        return most

    with torch.no_grad():
        assert size <= peak() <= 1.1 * size
    arguments['u'].requires_grad_()
    assert size <= peak() <= 1.1 * size + 64 * 16 * 4


def test_reversed_strided_input_is_not_copied():
    xz = torch.randn(1, 256, 64)
    x, z = xz.transpose(1, 2).chunk(2, dim=1)
    direction = Direction(x, x, -torch.rand(32, 4), torch.randn(1, 4, 256), torch.randn(1, 4, 256))
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
        torch.no_grad(),
    ):
        bidirectional_selective_scan(direction, direction, z, True, backend='cpp')
    called = {event.key for event in profile.key_averages()}
    assert 'mmvim_ops::cpp_bidirectional_scan' in called
    assert not called & {'aten::copy_', 'aten::flip', 'aten::clone', 'aten::contiguous'}
