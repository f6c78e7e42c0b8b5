"""What only the compiled CPU backend has: instruction sets, threads, its memory."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scan_cases import CPU_BACKENDS, assert_same, make_arguments, random_arguments, run

from mmvim_ops import (
    Direction,
    MixerDirection,
    bidirectional_selective_scan,
    causal_conv1d,
    mamba_mixer,
    memory,
    selective_scan,
)
from mmvim_ops.__main__ import describe_cpp
from mmvim_ops.backends.cpp import library
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


def in_new_process(code, **environment):
    return subprocess.run(
        [sys.executable, '-c', code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def test_the_environment_chooses_the_instruction_set():
    name = INSTRUCTION_SETS[-1]
    code = 'import mmvim_ops, torch; print(torch.ops.mmvim_ops.cpp_instruction_set())'
    assert in_new_process(code, MMVIM_OPS_ISA=name).stdout.strip() == name


def test_the_report_shows_what_the_environment_says(monkeypatch):
    best = f', {INSTRUCTION_SETS[0]} of {", ".join(INSTRUCTION_SETS)}'
    assert describe_cpp() == f'{best}, memory tuned'
    monkeypatch.setenv('MMVIM_OPS_ISA', INSTRUCTION_SETS[0])
    monkeypatch.setattr(library, 'TUNED', False)
    setting = f' as MMVIM_OPS_ISA={INSTRUCTION_SETS[0]}'
    assert describe_cpp() == f'{best}{setting}, memory left alone as MMVIM_OPS_TUNE_MEMORY=0'


@pytest.mark.parametrize(
    ('wanted', 'missing', 'present', 'message'),
    [
        ('avx512', None, ['avx2', 'portable'], 'avx512: this processor can run avx2, portable'),
        ('sse', None, ['portable'], "must be one of avx512, avx2, portable, got 'sse'"),
        ('portable', 'it is not compiled', [], "needs backend 'cpp', .*: it is not compiled"),
    ],
)
def test_an_instruction_set_that_cannot_run_is_refused(wanted, missing, present, message):
    with pytest.raises(ValueError, match=f'MMVIM_OPS_ISA.*{message}'):
        library.wanted_instruction_set(wanted, missing, present)


def test_importing_with_an_instruction_set_that_cannot_run_fails():
    result = in_new_process('import mmvim_ops', MMVIM_OPS_ISA='sse')
    assert result.returncode == 1
    assert "ValueError: MMVIM_OPS_ISA must be one of avx512, avx2, portable, got 'sse'" in (
        result.stderr
    )


MEMORY = """
import re, torch, mmvim_ops
block = torch.empty(20 << 20, dtype=torch.uint8).data_ptr()
with open('/proc/self/maps') as file:
    heap = [line.split()[0].split('-') for line in file if '[heap]' in line]
print('kept' if any(int(a, 16) <= block < int(b, 16) for a, b in heap) else 'fresh')
x = torch.zeros(1, 64, 1 << 16)  # 16 MiB
out = mmvim_ops.causal_conv1d(x, torch.zeros(64, 4))
middle, asked = out.data_ptr() + (8 << 20), False
with open('/proc/self/smaps') as file:
    for line in file:
        if bounds := re.match('([0-9a-f]+)-([0-9a-f]+) ', line):
            inside = int(bounds[1], 16) <= middle < int(bounds[2], 16)
        elif line.startswith('VmFlags') and inside:
            asked = ' hg' in line
print('large' if asked else 'small')
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='asks glibc and Linux')
@pytest.mark.parametrize(
    ('value', 'expected'), [('1', ['kept', 'large']), ('0', ['fresh', 'small'])]
)
def test_the_environment_switches_off_what_is_tuned_for_the_process(value, expected):
    result = in_new_process(MEMORY, MMVIM_OPS_TUNE_MEMORY=value)
    assert result.stdout.split() == expected, result.stderr


def test_a_senseless_switch_is_refused(monkeypatch):
    monkeypatch.setenv('MMVIM_OPS_TUNE_MEMORY', 'no')
    with pytest.raises(ValueError, match="MMVIM_OPS_TUNE_MEMORY must be 0 or 1, got 'no'"):
        memory.is_tuned()


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
        given = [value.requires_grad_(), weight.requires_grad_()]
        ours, expected = causal_conv1d(*given, backend='cpp'), causal_conv1d_naive(*given)
        torch.testing.assert_close(ours, expected)
        upstream = torch.randn_like(ours)
        torch.testing.assert_close(
            torch.autograd.grad(ours, given, upstream),
            torch.autograd.grad(expected, given, upstream),
            rtol=1e-5,
            atol=2e-5,
        )


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ('rows', 'inputs', 'outputs'),
    [(1, 1, 1), (4, 0, 5), (5, 3, 17), (196, 12, 96), (13, 1200, 44), (2100, 20, 33), (40, 7, 100)],
)
def test_every_instruction_set_multiplies(rows, inputs, outputs, dtype, instruction_set):
    torch.manual_seed(0)
    x, weight = torch.randn(1, rows, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype)
    for bias in (None, torch.randn(outputs, dtype=dtype)):
        expected = torch.nn.functional.linear(x, weight, bias)
        torch.testing.assert_close(ops.cpp_linear(x, weight, bias), expected, rtol=1e-5, atol=1e-4)


def test_products_of_shapes_that_do_not_fit_are_refused():
    for weight, bias in ((torch.ones(3, 7), None), (torch.ones(3, 8), torch.ones(4))):
        with pytest.raises(RuntimeError, match='linear: x, weight and bias must be'):
            ops.cpp_linear(torch.ones(1, 5, 8), weight, bias)


def mixer_results(dtype=torch.float32):
    """Output, gradients of tokens and weights, and the output under autocast, of a mixer."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return (torch.randn(shape, generator=generator) * 0.3).to(dtype).requires_grad_()

    def direction(reverse):
        A = -torch.rand(38, 5, generator=generator).to(dtype)
        shapes = (38, 4), (38,), (13, 38), (38, 3), (38,)
        return MixerDirection(*(randn(*shape) for shape in shapes), A, randn(38), reverse)

    given = [randn(3, 50, 18), randn(76, 18), randn(20, 38), randn(18)]
    scans = [direction(bool(i)) for i in range(2)]
    tokens, into, outof, norm = given

    def mix():
        return mamba_mixer(tokens, into, scans, outof, norm_weight=norm, backend='cpp')

    out = mix()
    weights = [scans[-1].x_proj_weight, scans[0].dt_proj_weight, scans[0].conv_weight]
    grads = torch.autograd.grad(out.square().sum(), [*given, *weights])
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        half = mix()
    return [out.detach(), *grads], half


def test_every_instruction_set_mixes(instruction_set):
    check_mixer_results()


def test_any_number_of_threads_mixes(threads):
    check_mixer_results()


def check_mixer_results():
    exact, _ = mixer_results(torch.float64)
    ours, half = mixer_results()
    for mine, yours in zip([*ours, half], [*exact, exact[0]], strict=True):
        assert (mine - yours).norm() < (1e-5 if mine is not half else 2e-2) * yours.norm()


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


def decayed(A):
    """exp(Δ A) for Δ = 1, as it decays a state of one: h_1 with u = (1, 0)."""
    u = torch.tensor([1.0, 0.0]).expand(1, len(A), 2)
    one = torch.ones(1, 1, 2)
    return selective_scan(u, torch.ones_like(u), A[:, None], one, one, backend='cpp')[0, :, 1]


def test_exp_has_an_error_below_1e_6(instruction_set):
    A = torch.linspace(-80, 0, 200_001)
    y, expected = decayed(A), A.double().exp()
    assert (y - expected).abs().max() < 2e-7
    assert ((y - expected) / expected)[A > -10].abs().max() < 1e-6


def test_exp_is_right_from_underflow_to_overflow(instruction_set):
    A = torch.linspace(-200, 88, 100_003)
    exact, result = A.double().exp(), decayed(A).double()
    normal = exact > 2 * torch.finfo(torch.float32).tiny
    # what the product of A with 1 / ln 2 is rounded by counts as often as A is large
    error = (result / exact - 1).abs()[normal]
    assert (error < 2e-7 + 1.2e-7 * A[normal].abs()).all()
    assert (result[~normal] - exact[~normal]).abs().max() < 2 * torch.finfo(torch.float32).tiny
    special = torch.tensor([0.0, -0.0, 1e-42, -1e-42, -1e5, -torch.inf])
    assert decayed(special).tolist() == [1, 1, 1, 1, 0, 0]
    for number in special:  # beside numbers that need no clamps, too
        mixed = torch.full((50,), -1.0)
        mixed[17] = number
        torch.testing.assert_close(decayed(mixed), mixed.exp(), rtol=1e-6, atol=0)


def test_every_nan_in_delta_stays_one(instruction_set):
    for payload in (0x7FC00000, 0x7FC00001, 0x7F800001, 0xFFC00155 - 2**32):
        delta = torch.full((1, 40, 4), 0.1)
        delta.view(torch.int32)[0, 21, 2] = payload
        u, B, A = torch.ones_like(delta), torch.ones(1, 3, 4), -torch.rand(40, 3)
        y = selective_scan(u, delta, A, B, B, backend='cpp')
        assert y.isnan().nonzero().tolist() == [[0, 21, 2], [0, 21, 3]]


def test_softplus_of_the_largest_and_the_smallest(instruction_set):
    x = torch.tensor([-torch.inf, -1e5, -1e-42, 0.0, 1e-42, 1e5, torch.nan])
    expected = torch.nn.functional.softplus(x.double(), threshold=1000).float()
    torch.testing.assert_close(through_delta(x), expected, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize('name', INSTRUCTION_SETS[1:])
def test_the_operations_pass_their_tests_on_every_instruction_set(name):
    """The best instruction set is that of the ordinary run."""
    folder = Path(__file__).resolve().parents[1]
    operations = ('selective_scan', 'bidirectional', 'scan_segment', 'causal_conv1d', 'mamba_mixer')
    result = subprocess.run(
        [
            *(sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', '-k', 'cpp'),
            *(folder / f'test_{operation}.py' for operation in operations),
        ],
        env=os.environ | {'MMVIM_OPS_ISA': name},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr
    assert ' passed' in result.stdout


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
