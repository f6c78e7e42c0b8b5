"""The selective scan in standard ONNX operators, which any runtime has.

An ONNX ``Scan`` goes through the tokens one by one, as the equation does: nothing can overflow, the
length may vary, and memory holds one state per channel, not one per token. Blocks of the sequence
in parallel would not be faster: over half of the time is arithmetic, of which they need nearly
twice as much (docs/deployment.md has figures).
"""

from collections.abc import Callable

import torch
from onnxscript import FLOAT, graph, script
from onnxscript import opset18 as op

__all__ = ['TRANSLATIONS']


@script(default_opset=op)
def selective_scan(u: FLOAT, delta: FLOAT, A: FLOAT, B: FLOAT, C: FLOAT) -> tuple[FLOAT, FLOAT]:
    """Arguments and results of the operator ``mmvim_ops::torch_scan``.

    u and delta are (batch, channels, length), A is (channels, states), B and C are
    (batch, groups, states, length).
    """
    # Time comes first, and channels last, where they are neighbours in memory.
    batch_and_groups = op.Shape(B, start=0, end=2)
    length = op.Shape(B, start=3, end=4)
    states = op.Shape(B, start=2, end=3)
    groups = op.Shape(B, start=1, end=2)
    rest = op.Constant(value_ints=[-1])
    one = op.Constant(value_ints=[1])
    row = op.Concat(length, batch_and_groups, one, rest, axis=0)
    steps = op.Reshape(op.Transpose(delta, perm=[2, 0, 1]), row)  # (L, B, G, 1, d)
    inputs = op.Reshape(op.Transpose(op.Mul(delta, u), perm=[2, 0, 1]), row)  # (L, B, G, 1, d)
    columns = op.Unsqueeze(op.Transpose(B, perm=[3, 0, 1, 2]), op.Constant(value_ints=[4]))
    rows = op.Unsqueeze(op.Transpose(C, perm=[3, 0, 1, 2]), op.Constant(value_ints=[3]))
    by_group = op.Reshape(A, op.Concat(groups, rest, states, axis=0))
    matrix = op.Transpose(by_group, perm=[0, 2, 1])  # (G, N, d)
    channels = op.Shape(matrix, start=2, end=3)
    start = op.ConstantOfShape(op.Concat(batch_and_groups, states, channels, axis=0))

    @graph()
    def step(state, delta_t, input_t, B_t, C_t):
        decay = op.Exp(op.Mul(delta_t, matrix))  # (B, G, N, d)
        following = op.Add(op.Mul(decay, state), op.Mul(B_t, input_t))
        y_t = op.MatMul(C_t, following)  # (B, G, 1, d)
        return following, y_t

    last, y = op.Scan(start, steps, inputs, columns, rows, body=step, num_scan_inputs=4)
    flat = op.Concat(length, op.Shape(u, start=0, end=2), axis=0)
    out = op.Transpose(op.Reshape(y, flat), perm=[1, 2, 0])  # (B, D, L)
    by_channel = op.Transpose(last, perm=[0, 1, 3, 2])  # (B, G, d, N)
    last_state = op.Reshape(by_channel, op.Concat(op.Shape(u, start=0, end=2), states, axis=0))
    return out, last_state


def softplus(x, beta=1.0, threshold=20.0):
    """log(1 + exp(beta x)) / beta, or x where beta x is above the threshold, as ``aten::softplus``.

    ONNX Runtime computes its own ``Softplus`` one element at a time, these operators on vectors.
    """
    scaled = x if beta == 1 else op.Mul(x, beta)
    small = op.Exp(op.Neg(op.Abs(scaled)))  # at most 1: nothing overflows
    rounded = op.Add(small, 1.0)
    lost = op.Sub(small, op.Sub(rounded, 1.0))  # by the rounding: all of it, if it is small enough
    y = op.Add(op.Relu(scaled), op.Add(op.Log(rounded), lost))
    if beta != 1:
        y = op.Div(y, beta)
    # From 20 on y is x to float32's last digit.
    return y if threshold >= 20 else op.Where(op.Greater(scaled, threshold), x, y)


def mul_scalar(x, factor):
    """x times a number that may depend on the input's size, which torch translates for fixed sizes
    only."""
    return op.Mul(x, op.CastLike(factor, x))


#: For ``custom_translation_table`` of ``torch.onnx.export``.
TRANSLATIONS: dict[Callable, Callable] = {
    torch.ops.mmvim_ops.torch_scan.default: selective_scan,
    torch.ops.aten.softplus.default: softplus,
    torch.ops.aten.mul.Scalar: mul_scalar,
}
