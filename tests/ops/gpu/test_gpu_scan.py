"""One scan on a GPU, with its gradients and last state, against plain PyTorch in float64."""

from pathlib import Path

import pytest
import torch
from gpu_cases import (
    DEVICE,
    DTYPES,
    TOLERANCES,
    USUAL,
    check_scan,
    cuda_only,
    each_backend,
    each_case,
    size,
    skip_if_too_large,
    to_device,
)
from scan_cases import TENSORS, make_arguments, random_arguments, relative_error, run

from mmvim_ops import selective_scan
from mmvim_ops.backends.cuda import plan as cuda_plan
from mmvim_ops.naive import selective_scan_naive

GOLDENS = torch.load(
    Path(__file__).parents[2] / 'data/selective_scan_official.pt', weights_only=True
)
LONG = size((129, 500, 700, 1000), (129, 150, 190, 200))

# Each of these is one compilation of Triton's kernels, whatever the seed and the length.
FEW = (
    dict(USUAL, dtype=torch.bfloat16),
    dict(USUAL, reverse=True, gate=False),
    dict(USUAL, dtype=torch.float16, skip=False, reverse=True),
    dict(channels=51, states=5, groups_B=None, groups_C=3, bias=False, softplus=False),
    dict(channels=34, states=16, groups_B=2, groups_C=None, reverse=True),
    dict(channels=7, states=100, groups_B=0, groups_C=1),
)


def random_case(backend, seed):
    if backend == 'triton':
        lengths = size((99, 333, 901), (7, 9, 19))
        return make_arguments(**FEW[seed % 6], length=lengths[seed // 6], seed=seed)
    length = dict(length=LONG[seed // 2 % 4]) if seed % 2 else {}
    return random_arguments(seed, dtype=DTYPES[seed % 3], **length)


@each_case('seed', cuda=range(200), triton=range(18))
def test_random_arguments(backend, seed):
    check_scan(to_device(random_case(backend, seed)), backend)


@each_case('seed', cuda=range(1000, 1030))
def test_random_arguments_in_many_chunks(backend, seed, chunks):
    fixed = dict(length=LONG[seed % 4], dtype=DTYPES[seed % 3])
    check_scan(to_device(random_arguments(seed, **fixed)), backend)


@each_case('name', cuda=GOLDENS, triton=('all_options', 'constant_bc', 'long'))
def test_reproduces_the_official_reference(backend, name):
    golden = to_device(GOLDENS[name])
    inputs = {k: x if x is None else x.requires_grad_() for k, x in golden['inputs'].items()}
    out, last_state = selective_scan(
        **inputs, delta_softplus=golden['delta_softplus'], return_last_state=True, backend=backend
    )
    assert relative_error(out, golden['out']) < 2e-4
    assert relative_error(last_state, golden['last_state']) < 2e-4
    out.backward(golden['grad_out'])
    for tensor in TENSORS:
        if inputs[tensor] is not None:
            assert relative_error(inputs[tensor].grad, golden['grads'][tensor]) < 2e-4, tensor


def describe(channels, length, dtype, gate):
    return f'{channels}x{length}-{str(dtype).split(".")[1]}-{"gate" if gate else "plain"}'


SIZES = {
    describe(channels, length, dtype, gate): (channels, length, dtype, gate)
    for channels in (384, 768)
    for length in (1000, 4096)
    for dtype in DTYPES
    for gate in (True, False)
}


@each_case('case', cuda=SIZES, triton=('384x4096-float32-gate', '768x1000-bfloat16-gate'))
def test_sizes_of_vim(backend, case):
    channels, length, dtype, gate = SIZES[case]
    shape = size(
        dict(batch=3, channels=channels, length=length),
        dict(batch=1, channels=channels // 8, length=length // 20 if backend == 'cuda' else 11),
    )
    fixed = USUAL | shape | dict(channels_last=length == 1000, reverse=channels == 768)
    check_scan(to_device(make_arguments(**fixed, gate=gate, dtype=dtype)), backend)


@cuda_only
@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('channels', [150, 384])
@pytest.mark.parametrize('warps', [1, 5, 8])
@pytest.mark.parametrize('lanes', [2, 4, 8])
def test_blocks_of_any_size(backend, lanes, warps, channels, reverse, monkeypatch, cut, chunks):
    """Backward blocks, too, that take several sets of channels in turn."""
    skip_if_too_large(9, 1, lanes, warps)
    cut(lanes=lanes, warps=warps)
    monkeypatch.setattr(cuda_plan, 'split_channels', lambda cut, sizes: 2)
    shape = dict(channels=channels, length=size(1000, 140), states=9, reverse=reverse)
    check_scan(to_device(make_arguments(**USUAL | shape)), backend)


@cuda_only
@pytest.mark.parametrize('groups', [0, None])
@pytest.mark.parametrize('states', [17, 64, 65, 128, 256])
def test_many_states(backend, states, groups):
    length = size(700, 70)
    arguments = make_arguments(2, 37, length, states, groups_B=groups, groups_C=0)
    check_scan(to_device(arguments), backend)


def lay_out(x, rows, aligned):
    """Along channels or time in memory, at the start of words of 16 bytes or not."""
    if not isinstance(x, torch.Tensor) or x.ndim < 3:
        return x
    x = x.mT if rows == 'channels' else x  # (..., rows)
    room = x.new_empty(*x.shape[:-1], x.shape[-1] + 8)
    x = room[..., slice(0, -8) if aligned else slice(1, -7)].copy_(x)
    return x.mT if rows == 'channels' else x


@cuda_only
@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('rows', ['channels', 'time'])
@pytest.mark.parametrize('dtype', DTYPES)
def test_rows_that_are_read_in_words_and_others(backend, dtype, rows, aligned, chunks):
    fixed = USUAL | dict(channels=72, length=size(600, 150), reverse=aligned)
    arguments = to_device(make_arguments(**fixed, dtype=dtype))
    given = {name: lay_out(x, rows, aligned) for name, x in arguments.items()}
    check_scan(arguments, backend, given)


@each_backend
def test_any_strides(backend):
    arguments = to_device(make_arguments(channels=8, length=size(300, 33)))
    strided = dict(arguments)
    for name in ('u', 'delta', 'B', 'C', 'z'):
        x = arguments[name]
        wide = x.new_full((*x.shape[:-2], x.shape[-1] + 3, 2 * x.shape[-2] + 1), 9e9)
        strided[name] = wide.transpose(-1, -2)[..., 1:-1:2, 2:-1].copy_(x)
    for name in ('D', 'delta_bias'):
        strided[name] = arguments[name].repeat_interleave(2)[::2]
    strided['A'] = arguments['A'].T.contiguous().T
    check_scan(arguments, backend, strided)


@cuda_only
def test_dtypes_may_be_mixed(backend):
    arguments = make_arguments(**USUAL, length=size(300, 50), dtype=torch.bfloat16)
    for name in ('delta', 'C'):
        arguments[name] = arguments[name].float()
    check_scan(to_device(arguments), backend)


@each_backend
@pytest.mark.parametrize('empty', ['length', 'batch', 'channels'])
def test_empty_input(backend, empty):
    result = run(selective_scan, to_device(make_arguments(**{empty: 0})), backend=backend)
    assert result['out'].numel() == 0
    assert result['last_state'].abs().sum() == 0
    assert all(result[f'grad of {name}'].abs().sum() == 0 for name in ('A', 'B', 'C'))


@each_backend
@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')], ids=str)
@pytest.mark.parametrize('name', ['u', 'delta', 'A', 'B', 'z', 'D'])
def test_non_finite_input_goes_where_the_specification_sends_it(backend, name, value):
    """A GPU's approximations of exp2 and 1 / x have special values of their own."""
    arguments = to_device(make_arguments(**USUAL, length=19, reverse=True))
    arguments[name][(1,) if name == 'D' else (1, 1) if name == 'A' else (1, 1, ..., 7)] = value
    actual = run(selective_scan, arguments, with_gradients=False, backend=backend)
    expected = run(selective_scan_naive, arguments, with_gradients=False)
    for key in ('out', 'last_state'):
        finite = expected[key].isfinite()
        assert torch.equal(actual[key].isfinite(), finite), key
        assert (
            relative_error(actual[key][finite], expected[key][finite]) < TOLERANCES[torch.float32]
        )


@cuda_only
@pytest.mark.parametrize('reverse', [False, True])
def test_decay_of_any_strength(backend, reverse, chunks):
    length = size(3000, 300)
    arguments = to_device(make_arguments(1, 2, length, 2, reverse=reverse))
    arguments['A'] = torch.tensor([[-1e-4, -1.0], [-1e2, -1e4]], device=DEVICE)
    arguments['delta'][:, :, ::50] = 30.0  # where softplus is the identity
    arguments['delta'][:, :, 1::50] = -30.0  # and where it is exp
    check_scan(arguments, backend)
