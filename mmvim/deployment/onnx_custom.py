"""The scan and the convolution as custom ONNX operators, which a library of ``mmvim_ops`` has.

:func:`mmvim_ops.selective_scan` and its neighbours say what they compute. Here sequences are
(batch, length, channels), as they lie in memory. The transpositions that this takes meet those of
the model, and ONNX Runtime takes both away.
"""

from collections.abc import Callable

import torch
from onnx.defs import OpSchema
from onnxscript import opset18 as op
from onnxscript.values import Op, Opset

from .onnx_scan import mul_scalar

__all__ = ['TRANSLATIONS']

DOMAIN = Opset('mmvim_ops', 1)


def custom(name: str, inputs: str, **attributes: OpSchema.AttrType) -> Op:
    """An operator of float32 tensors with one output; ``?`` marks inputs that may be left out."""
    options = OpSchema.FormalParameterOption
    parameters = [
        OpSchema.FormalParameter(
            given.rstrip('?'),
            'T',
            param_option=options.Optional if given.endswith('?') else options.Single,
        )
        for given in inputs.split()
    ]
    schema = OpSchema(
        name,
        DOMAIN.domain,
        DOMAIN.version,
        inputs=parameters,
        outputs=[OpSchema.FormalParameter('y', 'T')],
        type_constraints=[('T', ['tensor(float)'], '')],
        attributes=[OpSchema.Attribute(key, kind) for key, kind in attributes.items()],
    )
    return Op(DOMAIN, name, schema)


INT, FLOAT = OpSchema.AttrType.INT, OpSchema.AttrType.FLOAT
SelectiveScan = custom(
    'SelectiveScan', 'u delta A B C D? z? delta_bias?', delta_softplus=INT, reverse=INT
)
BidirectionalScan = custom(
    'BidirectionalScan',
    'u delta A B C D? delta_bias? u_b delta_b A_b B_b C_b D_b? delta_bias_b? z?',
    delta_softplus=INT,
    scale=FLOAT,
)
CausalConv1d = custom('CausalConv1d', 'x weight bias?', silu=INT, reverse=INT)


def by_time(x):
    """(batch, channels, length) to (batch, length, channels), and back."""
    return None if x is None else op.Transpose(x, perm=[0, 2, 1])


def matrix_by_time(m):
    """B or C with states last, where they vary."""
    rank = len(m.shape)
    if rank == 2:
        return m
    return op.Transpose(m, perm=[0, 2, 1] if rank == 3 else [0, 1, 3, 2])


def direction(u, delta, A, B, C, D) -> tuple:
    return by_time(u), by_time(delta), A, matrix_by_time(B), matrix_by_time(C), D


def scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, save):
    """``mmvim_ops::cpp_scan``, of whose results the model uses the first."""
    out = SelectiveScan(
        *direction(u, delta, A, B, C, D),
        by_time(z),
        delta_bias,
        delta_softplus=int(delta_softplus),
        reverse=int(reverse),
    )
    return (by_time(out),)


def bidirectional_scan(
    u, delta, A, B, C, D, delta_bias, u_b, delta_b, A_b, B_b, C_b, D_b, delta_bias_b, z,
    delta_softplus, scale, save,
):  # fmt: skip
    """``mmvim_ops::cpp_bidirectional_scan``, of whose results the model uses the first."""
    out = BidirectionalScan(
        *direction(u, delta, A, B, C, D),
        delta_bias,
        *direction(u_b, delta_b, A_b, B_b, C_b, D_b),
        delta_bias_b,
        by_time(z),
        delta_softplus=int(delta_softplus),
        scale=float(scale),
    )
    return (by_time(out),)


def conv1d(x, weight, bias, silu, reverse):
    """``mmvim_ops::cpp_conv1d``."""
    return by_time(CausalConv1d(by_time(x), weight, bias, silu=int(silu), reverse=int(reverse)))


#: For ``custom_translation_table`` of ``torch.onnx.export``.
TRANSLATIONS: dict[Callable, Callable] = {
    torch.ops.mmvim_ops.cpp_scan.default: scan,
    torch.ops.mmvim_ops.cpp_bidirectional_scan.default: bidirectional_scan,
    torch.ops.mmvim_ops.cpp_conv1d.default: conv1d,
    torch.ops.aten.mul.Scalar: mul_scalar,
}
