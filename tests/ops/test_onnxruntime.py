"""The custom operators of ONNX Runtime compute what the operations of the package do."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')
pytest.importorskip('onnx', reason='onnx is not installed')
import onnxruntime
from onnx import helper

from mmvim_ops import (
    Direction,
    bidirectional_selective_scan,
    causal_conv1d,
    onnxruntime_library,
    selective_scan,
)
from mmvim_ops import onnxruntime as module

if not module.LIBRARY.exists():
    pytest.skip('the library for ONNX Runtime is not compiled', allow_module_level=True)
BATCH, CHANNELS, STATES = 2, 20, 5
LENGTHS = [0, 1, 31, 170]
DIRECTION = ('u', 'delta', 'A', 'B', 'C', 'D', 'delta_bias')


def session(operator: str, names: list[str], threads: int = 1, **attributes):
    """Of a model with one operator; the names of its inputs, empty where one is left out."""
    given = [name for name in names if name]
    node = helper.make_node(operator, names, ['y'], domain='mmvim_ops', **attributes)
    *inputs, output = (helper.make_tensor_value_info(name, 1, None) for name in (*given, 'y'))
    graph = helper.make_graph([node], 'graph', inputs, [output])
    opsets = [helper.make_opsetid('', 18), helper.make_opsetid('mmvim_ops', 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what is refused is raised, too
    options.register_custom_ops_library(onnxruntime_library())
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def run(operator: str, inputs: dict[str, torch.Tensor | None], threads=1, **attributes):
    names = [name if x is not None else '' for name, x in inputs.items()]
    given = {name: x.contiguous().numpy() for name, x in inputs.items() if x is not None}
    return torch.from_numpy(session(operator, names, threads, **attributes).run(None, given)[0])


def matrix(kind: str | int, length: int) -> torch.Tensor:
    """B or C: 'constant', 'varying', or of so many groups."""
    if kind == 'constant':
        return torch.randn(CHANNELS, STATES)
    return torch.randn(BATCH, *(() if kind == 'varying' else (kind,)), STATES, length)


def direction(length: int, B: str | int = 'varying', C: str | int = 'varying') -> Direction:
    return Direction(
        torch.randn(BATCH, CHANNELS, length),
        torch.randn(BATCH, CHANNELS, length),
        -torch.rand(CHANNELS, STATES),
        matrix(B, length),
        matrix(C, length),
        torch.randn(CHANNELS),
        torch.randn(CHANNELS),
    )


def by_time(d: Direction, suffix: str = '') -> dict[str, torch.Tensor | None]:
    """As the operators take them."""
    turned = {'u', 'delta', *(name for name in 'BC' if getattr(d, name).ndim > 2)}
    return {
        name + suffix: x.mT if name in turned else x for name, x in zip(DIRECTION, d, strict=True)
    }


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize('length', LENGTHS)
@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize(
    ('B', 'C'),
    [
        ('varying', 'varying'),
        ('constant', 'varying'),
        ('constant', 'constant'),
        (4, 4),
        ('constant', 2),
    ],
)
def test_selective_scan(length, reverse, B, C):
    d, z = direction(length, B, C), torch.randn(BATCH, CHANNELS, length)
    inputs = by_time(d)
    bias = inputs.pop('delta_bias')
    y = run(
        'SelectiveScan',
        {**inputs, 'z': z.mT, 'delta_bias': bias},
        threads=3,
        delta_softplus=1,
        reverse=int(reverse),
    )
    expected = selective_scan(*d[:6], z, d.delta_bias, True, reverse=reverse, backend='torch')
    torch.testing.assert_close(y, expected.mT)


def test_selective_scan_without_what_may_be_left_out():
    d = direction(40)._replace(D=None, delta_bias=None)
    d = d._replace(delta=d.delta.abs())
    y = run('SelectiveScan', by_time(d), delta_softplus=0, reverse=0)  # six of eight inputs
    torch.testing.assert_close(y, selective_scan(*d[:5], backend='torch').mT)


@pytest.mark.parametrize('length', LENGTHS)
@pytest.mark.parametrize('gate', [False, True])
def test_bidirectional_scan(length, gate):
    first, second = direction(length), direction(length)
    second = second._replace(D=None)
    z = torch.randn(BATCH, CHANNELS, length) if gate else None
    inputs = {**by_time(first), **by_time(second, '_b'), 'z': z.mT if gate else None}
    y = run('BidirectionalScan', inputs, threads=2, delta_softplus=1, scale=0.5)
    expected = bidirectional_selective_scan(first, second, z, True, scale=0.5, backend='torch')
    torch.testing.assert_close(y, expected.mT)


@pytest.mark.parametrize('length', LENGTHS)
@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('taps', [1, 4, 7])
def test_causal_conv1d(length, reverse, taps):
    x, weight = torch.randn(BATCH, CHANNELS, length), torch.randn(CHANNELS, taps)
    for bias, silu in ((None, False), (torch.randn(CHANNELS), True)):
        inputs = {'x': x.mT, 'weight': weight, 'bias': bias}
        y = run('CausalConv1d', inputs, threads=2, silu=int(silu), reverse=int(reverse))
        activation = 'silu' if silu else None
        expected = causal_conv1d(
            x, weight, bias, reverse=reverse, activation=activation, backend='torch'
        )
        torch.testing.assert_close(y, expected.mT)


WRONG = {
    'u must be (batch, length, channels)': dict(u=torch.randn(3, 4)),
    'delta must have the shape of u': dict(delta=torch.randn(BATCH, 29, CHANNELS)),
    'A must be (channels, states)': dict(A=torch.randn(CHANNELS + 1, STATES)),
    'B and C do not fit': dict(C=torch.randn(BATCH, 29, STATES)),
    'B and C do not fit to u and A': dict(B=torch.randn(BATCH, 4, 30, STATES)),
    'D must be (channels)': dict(D=torch.randn(CHANNELS + 1)),
}


@pytest.mark.parametrize('message', WRONG)
def test_inputs_that_do_not_fit_are_refused(message):
    inputs = by_time(direction(30)._replace(delta_bias=None)) | WRONG[message]
    with pytest.raises(Exception) as error:
        run('SelectiveScan', inputs, delta_softplus=1, reverse=0)
    assert f'mmvim_ops: {message}' in str(error.value)


def test_too_many_taps_are_refused():
    inputs = dict(x=torch.randn(1, 5, 3), weight=torch.randn(3, 9))
    with pytest.raises(Exception, match='with at most 8 taps'):
        run('CausalConv1d', inputs, silu=0, reverse=0)


def test_a_missing_attribute_is_refused():
    with pytest.raises(Exception, match='reverse'):
        run('CausalConv1d', dict(x=torch.randn(1, 5, 3), weight=torch.randn(3, 2)), silu=0)


@pytest.mark.parametrize(('isa', 'fits'), [('portable', True), ('', True), ('mmx', False)])
def test_the_environment_chooses_the_instruction_set(isa, fits):
    code = (
        'import onnxruntime\n'
        f'onnxruntime.SessionOptions().register_custom_ops_library({onnxruntime_library()!r})'
    )
    environment = os.environ | {'MMVIM_OPS_ISA': isa}
    result = subprocess.run(
        [sys.executable, '-c', code], env=environment, capture_output=True, text=True
    )
    assert (result.returncode == 0) == fits
    assert fits or 'no instruction set MMVIM_OPS_ISA=mmx' in result.stderr


def test_a_library_that_is_not_there_says_how_to_make_it(monkeypatch, tmp_path):
    monkeypatch.setattr(module, 'LIBRARY', tmp_path / 'no.so')
    with pytest.raises(RuntimeError, match='is not compiled; in the source tree, run: pip'):
        onnxruntime_library()
