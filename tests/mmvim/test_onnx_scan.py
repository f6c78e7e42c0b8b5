"""The translations to standard ONNX operators compute what the operators of torch do."""

import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmvim_ops.naive import selective_scan_naive

for package in ('onnx', 'onnxscript'):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[onnx]'")
onnxruntime = pytest.importorskip(
    'onnxruntime', reason="onnxruntime is not installed: pip install '.[onnx]'"
)

from onnxscript import FLOAT  # noqa: E402

from mmvim.deployment import onnx_scan  # noqa: E402


@pytest.fixture(scope='module')
def session():
    """The scan alone, with all of its sizes open."""
    sequence, matrix = FLOAT['B', 'D', 'L'], FLOAT['B', 'G', 'N', 'L']
    model = onnx_scan.selective_scan.to_model_proto(
        input_types=[sequence, sequence, FLOAT['D', 'N'], matrix, matrix],
        output_types=[sequence, FLOAT['B', 'D', 'N']],
        ir_version=10,
    )
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=['CPUExecutionProvider']
    )


@pytest.mark.parametrize('groups', [1, 3])
@pytest.mark.parametrize('length', [1, 2, 37, 200])
def test_scan_is_the_equation(session, length, groups):
    generator = torch.Generator().manual_seed(length)
    batch, channels, states = 2, 6, 4

    def random(*shape):
        return torch.randn(shape, generator=generator)

    u, delta = random(batch, channels, length), F.softplus(2 * random(batch, channels, length))
    A = -random(channels, states).exp()
    B, C = (random(batch, groups, states, length) for _ in range(2))
    inputs = dict(zip(('u', 'delta', 'A', 'B', 'C'), (u, delta, A, B, C), strict=True))
    outputs = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    expected = selective_scan_naive(
        *(x.double() for x in (u, delta, A, B, C)), return_last_state=True
    )
    for theirs, ours in zip(outputs, expected, strict=True):
        assert theirs.shape == ours.shape
        np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(
    'custom_translation_table' not in inspect.signature(torch.onnx.export).parameters,
    reason='torch takes translations from 2.6 on',
)
@pytest.mark.parametrize(('beta', 'threshold'), [(1.0, 20.0), (2.0, 20.0), (0.5, 1.0)])
def test_softplus_has_all_digits(beta, threshold):
    """Of small results as well: a step of 1e-6 is one that a model may have learned."""
    x = torch.cat([torch.linspace(-40, 80, 9999), torch.linspace(-1, 1, 999)])
    extreme = torch.tensor([-torch.inf, torch.inf, torch.nan])
    program = torch.onnx.export(
        torch.nn.Softplus(beta, threshold).eval(),
        (x,),
        dynamic_shapes=({0: torch.export.Dim('length')},),
        dynamo=True,
        custom_translation_table=onnx_scan.TRANSLATIONS,
        verbose=False,
    )
    assert 'Softplus' not in {node.op_type for node in program.model.graph}
    run = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), providers=['CPUExecutionProvider']
    ).run
    for values in (x, extreme):
        expected = F.softplus(values.double(), beta, threshold)
        (y,) = run(None, {'input': values.numpy()})
        np.testing.assert_allclose(y, expected, rtol=4e-7)
