"""The convolution's kernels of backend 'triton'; ``conv1d.py`` launches them.

A program works on a tile of steps and channels of one batch element. Sequences come as tuples
(x, batch, channel, time) of a pointer and its strides, the weight as (x, channel, tap), the bias as
(x, channel).
"""

import triton
import triton.language as tl


@triton.jit
def place(length, channels, STEPS: tl.constexpr, WIDTH: tl.constexpr):
    """What this program works on, in 64 bits as offsets follow: batch element, row of its tile
    among all, steps, channels, which channels exist."""
    program = tl.program_id(0).to(tl.int64)
    blocks = (channels + WIDTH - 1) // WIDTH
    tiles = (length + STEPS - 1) // STEPS
    row = program // blocks
    d = program % blocks * WIDTH + tl.arange(0, WIDTH)
    t = row % tiles * STEPS + tl.arange(0, STEPS)
    return row // tiles, row, t, d, d < channels


@triton.jit
def seen(x, batch, t, d, in_d, length, back, REVERSE: tl.constexpr, DTYPE: tl.constexpr):
    """The tile of ``x`` so many steps back, or ahead if REVERSE; zero outside of the sequence."""
    time = t + back if REVERSE else t - back
    exists = ((time >= 0) & (time < length))[:, None] & in_d[None, :]
    pointers = x[0] + batch * x[1] + d[None, :] * x[2] + time[:, None] * x[3]
    return tl.load(pointers, exists, 0).to(DTYPE)


@triton.jit
def convolved(
    x,
    weight,
    bias,
    batch,
    t,
    d,
    in_d,
    length,
    TAPS: tl.constexpr,
    REVERSE: tl.constexpr,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The tile before the activation."""
    y = tl.zeros((STEPS, WIDTH), DTYPE)
    if bias is not None:
        y += tl.load(bias[0] + d * bias[1], in_d, 0).to(DTYPE)[None, :]
    for k in range(0, TAPS):
        w = tl.load(weight[0] + d * weight[1] + k * weight[2], in_d, 0).to(DTYPE)
        y += w[None, :] * seen(x, batch, t, d, in_d, length, TAPS - 1 - k, REVERSE, DTYPE)
    return y


@triton.jit
def forward(
    x,
    weight,
    bias,
    out,
    length,
    channels,
    TAPS: tl.constexpr,
    SILU: tl.constexpr,
    REVERSE: tl.constexpr,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
):
    batch, _, t, d, in_d = place(length, channels, STEPS, WIDTH)
    y = convolved(x, weight, bias, batch, t, d, in_d, length, TAPS, REVERSE, STEPS, WIDTH, DTYPE)
    if SILU:
        y *= tl.sigmoid(y)
    exists = (t < length)[:, None] & in_d[None, :]
    tl.store(out[0] + batch * out[1] + d[None, :] * out[2] + t[:, None] * out[3], y, exists)


@triton.jit
def backward(
    grad_out,
    x,
    weight,
    bias,
    grad_y,
    sums,
    length,
    channels,
    TAPS: tl.constexpr,
    SILU: tl.constexpr,
    REVERSE: tl.constexpr,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The gradient before the activation, and what adds up to those of weight and bias.

    ``sums`` is contiguous, (tiles of all batch elements, taps + 1, channels); the last row of a
    tile is for the bias.
    """
    batch, row, t, d, in_d = place(length, channels, STEPS, WIDTH)
    g = seen(grad_out, batch, t, d, in_d, length, 0, False, DTYPE)
    if SILU:
        y = convolved(
            x, weight, bias, batch, t, d, in_d, length, TAPS, REVERSE, STEPS, WIDTH, DTYPE
        )
        s = tl.sigmoid(y)
        g *= s * (1 + y * (1 - s))
    exists = (t < length)[:, None] & in_d[None, :]
    pointers = grad_y[0] + batch * grad_y[1] + d[None, :] * grad_y[2] + t[:, None] * grad_y[3]
    tl.store(pointers, g, exists)
    to = sums + row * (TAPS + 1) * channels + d
    for k in range(0, TAPS):
        before = seen(x, batch, t, d, in_d, length, TAPS - 1 - k, REVERSE, DTYPE)
        tl.store(to + k * channels, tl.sum(g * before, 0), in_d)
    tl.store(to + TAPS * channels, tl.sum(g, 0), in_d)
