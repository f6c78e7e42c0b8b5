"""The scan's kernels of backend 'triton'; ``scan.py`` launches them.

The length is cut into chunks that run side by side. In either pass `chunk_ends` lets every chunk
begin from zero and keeps only where it ends, `carry` takes the true values across the borders, and
a third kernel goes through every chunk once more, now from the right start. Forward carries the
states h from the first chunk to the last, backward the gradients of h from the last to the first.

One program of one warp owns a block of channels in a chunk, with all their states in its registers,
and takes one time step after another. A tile is (states, channels): with up to 16 states each lane
has one channel, so that sums over states stay in the lane, and in the (batch, length, channels)
layout a warp reads neighbours. Sums over anything else get a row per program, which PyTorch adds
up: without atomics, results do not depend on the order of execution.

Arguments come as tuples of a pointer and its strides: sequences (x, batch, channel, time), matrices
(x, batch, group, state, time) or, where constant, (x, channel, state), vectors (x, channel). Of the
buffers between kernels, those with states are contiguous (batch, chunks, states, channels).
"""

import triton
import triton.language as tl

AHEAD = tl.constexpr(8)  # chunks whose ends `carry` has on their way at once

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x · LOG2E), and exp2 is one instruction
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def softplus(x):
    """max(x, 0) + log1p(exp(−|x|)), where log1p(e) = 2 artanh(e / (2 + e)) is summed as a series:
    its argument is at most 1/3, and unlike log(1 + e) it is exact where e is tiny."""
    TERMS: tl.constexpr = 17 if x.dtype == tl.float64 else 8
    e = tl.exp(-tl.abs(x))
    s = e / (2 + e)
    series = tl.zeros_like(x)
    for k in tl.static_range(TERMS):
        series = series * (s * s) + 1.0 / (2 * (TERMS - k) - 1)
    return tl.maximum(x, 0) + 2 * s * series


@triton.jit
def place(length, per_group, blocks, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr):
    """What this program works on, in 64 bits as offsets follow: batch element, row of its chunk
    among all, group, channels, which of them exist, first step, number of steps, block."""
    program = tl.program_id(0).to(tl.int64)
    chunks = (length + CHUNK - 1) // CHUNK
    block = program % blocks  # neighbours share B and C
    row = program // blocks
    chunk = row % chunks
    group_blocks = (per_group + BLOCK_D - 1) // BLOCK_D
    group = block // group_blocks
    member = block % group_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    first = chunk * CHUNK
    steps = tl.minimum(length - first, CHUNK)
    d = group * per_group + member  # (BLOCK_D,)
    return row // chunks, row, group, d, member < per_group, first, steps, block


@triton.jit
def time(step, length, REVERSE: tl.constexpr):
    return length - 1 - step if REVERSE else step


@triton.jit
def sequence(x, batch, d):
    """Pointers to the first time of these channels, and the stride of time."""
    return x[0] + batch * x[1] + d * x[2], x[3]


@triton.jit
def vector(x, d, in_d, DTYPE: tl.constexpr):
    """Zeros where there is none."""
    if x is None:
        return tl.zeros_like(d).to(DTYPE)
    else:
        return tl.load(x[0] + d * x[1], in_d, 0).to(DTYPE)


@triton.jit
def matrix_tile(x, n, d, in_tile, DTYPE: tl.constexpr):
    return tl.load(x[0] + d[None, :] * x[1] + n[:, None].to(tl.int64) * x[2], in_tile, 0).to(DTYPE)


@triton.jit
def matrix(x, batch, group, n, d, in_tile, DTYPE: tl.constexpr):
    """For :func:`matrix_at`: pointers and the stride of time, or the values where constant."""
    if len(x) == 3:
        return (matrix_tile(x, n, d, in_tile, DTYPE),)
    else:
        return x[0] + batch * x[1] + group * x[2] + n.to(tl.int64) * x[3], x[4]


@triton.jit
def matrix_at(x, t, in_n, DTYPE: tl.constexpr):
    """B_t or C_t, in a shape that spreads over the tile."""
    if len(x) == 1:
        return x[0]
    else:
        return tl.load(x[0] + t * x[1], in_n, 0).to(DTYPE)[:, None]


@triton.jit
def state_tile(row, n, d, STATES: tl.constexpr, channels):
    """Offsets into a buffer (rows, states, channels)."""
    return (row * STATES + n[:, None]) * channels + d[None, :]


@triton.jit
def chunk_ends(
    x,
    gate,
    delta,
    A,
    M,
    delta_bias,
    ends,
    sums,
    length,
    channels,
    per_group,
    blocks,
    STATES: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    BACKWARD: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Where each chunk ends that begins from zero, and its sum of Δ.

    Forward: x is u, M is B, and the end is h. Backward: x is the gradient of the output, M is C,
    and the end is the gradient of the h that the chunk begins with.
    """
    batch, row, group, d, in_d, first, steps, _ = place(length, per_group, blocks, BLOCK_D, CHUNK)
    n = tl.arange(0, BLOCK_N)
    in_n = n < STATES
    in_tile = in_n[:, None] & in_d[None, :]
    x, x_stride = sequence(x, batch, d)
    delta, delta_stride = sequence(delta, batch, d)
    if gate is not None:
        gate, gate_stride = sequence(gate, batch, d)
    bias = vector(delta_bias, d, in_d, DTYPE)
    A = matrix_tile(A, n, d, in_tile, DTYPE) * LOG2E
    M = matrix(M, batch, group, n, d, in_tile, DTYPE)

    end = tl.zeros((BLOCK_N, BLOCK_D), DTYPE)
    total = tl.zeros((BLOCK_D,), DTYPE)
    for i in range(0, steps):
        t = time(first + (steps - 1 - i if BACKWARD else i), length, REVERSE)
        step = tl.load(delta + t * delta_stride, in_d, 0).to(DTYPE) + bias
        value = tl.load(x + t * x_stride, in_d, 0).to(DTYPE)
        if gate is not None:
            opening = tl.load(gate + t * gate_stride, in_d, 0).to(DTYPE)
            value *= opening * tl.sigmoid(opening)
        if SOFTPLUS:
            step = softplus(step)
        total += step
        decay = tl.exp2(step[None, :] * A)
        if BACKWARD:
            end = decay * (end + value[None, :] * matrix_at(M, t, in_n, DTYPE))
        else:
            end = decay * end + (step * value)[None, :] * matrix_at(M, t, in_n, DTYPE)
    tl.store(ends + state_tile(row, n, d, STATES, channels), end, in_tile)
    tl.store(sums + row * channels + d, total, in_d)


@triton.jit
def carry(
    ends,
    sums,
    A,
    begin,
    chunks,
    channels,
    STATES: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Replace the end of every chunk by what it really begins with.

    ``begin`` is what the first chunk of the pass begins with, (x, batch, channel, state); None for
    zero.
    """
    size = STATES * channels
    blocks = (size + BLOCK - 1) // BLOCK
    batch = tl.program_id(0).to(tl.int64) // blocks
    i = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    n, d = i // channels, i % channels
    A = tl.load(A[0] + d * A[1] + n * A[2], inside, 0).to(DTYPE) * LOG2E
    if begin is None:
        value = tl.zeros((BLOCK,), DTYPE)
    else:
        value = tl.load(begin[0] + batch * begin[1] + d * begin[2] + n * begin[3], inside, 0)
        value = value.to(DTYPE)
    for c in range(0, chunks, AHEAD):
        loaded = ()
        for k in tl.static_range(AHEAD):
            row = batch * chunks + (chunks - 1 - c - k if BACKWARD else c + k)
            there = inside & (c + k < chunks)
            end = tl.load(ends + row * size + i, there, 0)
            total = tl.load(sums + row * channels + d, there, 0)
            loaded = loaded + (end, total)
        for k in tl.static_range(AHEAD):
            row = batch * chunks + (chunks - 1 - c - k if BACKWARD else c + k)
            tl.store(ends + row * size + i, value, inside & (c + k < chunks))
            value = tl.exp2(loaded[2 * k + 1] * A) * value + loaded[2 * k]


@triton.jit
def forward(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    starts,
    out,
    last_state,
    length,
    channels,
    per_group,
    blocks,
    STATES: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
):
    batch, row, group, d, in_d, first, steps, _ = place(length, per_group, blocks, BLOCK_D, CHUNK)
    n = tl.arange(0, BLOCK_N)
    in_n = n < STATES
    in_tile = in_n[:, None] & in_d[None, :]
    u, u_stride = sequence(u, batch, d)
    delta, delta_stride = sequence(delta, batch, d)
    out, out_stride = sequence(out, batch, d)
    if z is not None:
        z, z_stride = sequence(z, batch, d)
    bias = vector(delta_bias, d, in_d, DTYPE)
    skip = vector(D, d, in_d, DTYPE)
    A = matrix_tile(A, n, d, in_tile, DTYPE) * LOG2E
    B = matrix(B, batch, group, n, d, in_tile, DTYPE)
    C = matrix(C, batch, group, n, d, in_tile, DTYPE)

    h = tl.load(starts + state_tile(row, n, d, STATES, channels), in_tile, 0)
    for i in range(0, steps):
        t = time(first + i, length, REVERSE)
        step = tl.load(delta + t * delta_stride, in_d, 0).to(DTYPE) + bias
        x = tl.load(u + t * u_stride, in_d, 0).to(DTYPE)
        if SOFTPLUS:
            step = softplus(step)
        h = tl.exp2(step[None, :] * A) * h + (step * x)[None, :] * matrix_at(B, t, in_n, DTYPE)
        y = tl.sum(h * matrix_at(C, t, in_n, DTYPE), 0)
        if D is not None:
            y += skip * x
        if z is not None:
            gate = tl.load(z + t * z_stride, in_d, 0).to(DTYPE)
            y *= gate * tl.sigmoid(gate)
        tl.store(out + t * out_stride, y, in_d)

    last = in_tile & (first + steps == length)
    tl.store(last_state + (batch * channels + d[None, :]) * STATES + n[:, None], h, last)


@triton.jit
def backward(
    grad_out,
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    starts,
    arriving,
    scratch,
    grad_u,
    grad_delta,
    grad_z,
    grad_A,
    grad_B,
    grad_C,
    grad_D,
    grad_bias,
    length,
    channels,
    per_group,
    blocks,
    STATES: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """All gradients of one chunk, from h at its start and the gradient that arrives at its end.

    The states are computed twice: once through the chunk, which leaves every STRIDE-th in
    ``scratch``, and once more from there, STRIDE steps at a time, the last ones first. Time-varying
    ones of grad_B and grad_C are (batch, blocks, length, states); grad_A, constant ones,
    grad_D and grad_bias have a row per batch element and chunk.
    """
    batch, row, group, d, in_d, first, steps, block = place(
        length, per_group, blocks, BLOCK_D, CHUNK
    )
    n = tl.arange(0, BLOCK_N)
    in_n = n < STATES
    in_tile = in_n[:, None] & in_d[None, :]
    grad_out, grad_out_stride = sequence(grad_out, batch, d)
    u, u_stride = sequence(u, batch, d)
    delta, delta_stride = sequence(delta, batch, d)
    grad_u, grad_u_stride = sequence(grad_u, batch, d)
    grad_delta, grad_delta_stride = sequence(grad_delta, batch, d)
    if z is not None:
        z, z_stride = sequence(z, batch, d)
        grad_z, grad_z_stride = sequence(grad_z, batch, d)
    bias = vector(delta_bias, d, in_d, DTYPE)
    skip = vector(D, d, in_d, DTYPE)
    A = matrix_tile(A, n, d, in_tile, DTYPE) * LOG2E
    B = matrix(B, batch, group, n, d, in_tile, DTYPE)
    C = matrix(C, batch, group, n, d, in_tile, DTYPE)

    tile = state_tile(row, n, d, STATES, channels)
    saved = scratch + state_tile(row * (CHUNK // STRIDE), n, d, STATES, channels)
    between = STATES * channels  # two saved states are this far apart
    h = tl.load(starts + tile, in_tile, 0)
    tl.store(saved, h, in_tile)
    strides = (steps + STRIDE - 1) // STRIDE
    for j in range(1, strides):  # all these steps exist
        for i in tl.static_range(STRIDE):
            t = time(first + (j - 1) * STRIDE + i, length, REVERSE)
            step = tl.load(delta + t * delta_stride, in_d, 0).to(DTYPE) + bias
            x = tl.load(u + t * u_stride, in_d, 0).to(DTYPE)
            if SOFTPLUS:
                step = softplus(step)
            h = tl.exp2(step[None, :] * A) * h + (step * x)[None, :] * matrix_at(B, t, in_n, DTYPE)
        tl.store(saved + j * between, h, in_tile)
    tl.debug_barrier()  # the loads below see the stores above

    flow = tl.load(arriving + tile, in_tile, 0)  # gradient of h from the steps after this one
    sum_A = tl.zeros((BLOCK_N, BLOCK_D), DTYPE)
    sum_B = tl.zeros((BLOCK_N, BLOCK_D), DTYPE)
    sum_C = tl.zeros((BLOCK_N, BLOCK_D), DTYPE)
    sum_D = tl.zeros((BLOCK_D,), DTYPE)
    sum_bias = tl.zeros((BLOCK_D,), DTYPE)
    for k in range(0, strides):
        j = strides - 1 - k
        h = tl.load(saved + j * between, in_tile, 0)
        before = ()  # h_{t−1}
        by_y = ()  # gradient of C_t · h_t + D u_t
        for i in tl.static_range(STRIDE):
            exists = first + j * STRIDE + i < length
            t = time(first + j * STRIDE + i, length, REVERSE)
            there = in_d & exists
            step = tl.load(delta + t * delta_stride, there, 0).to(DTYPE) + bias
            x = tl.load(u + t * u_stride, there, 0).to(DTYPE)
            g = tl.load(grad_out + t * grad_out_stride, there, 0).to(DTYPE)
            if SOFTPLUS:
                step = softplus(step)
            before = before + (h,)
            B_t = matrix_at(B, t, in_n & exists, DTYPE)
            C_t = matrix_at(C, t, in_n & exists, DTYPE)
            h = tl.exp2(step[None, :] * A) * h + (step * x)[None, :] * B_t
            if z is not None:
                gate = tl.load(z + t * z_stride, there, 0).to(DTYPE)
                opening = tl.sigmoid(gate)
                y = tl.sum(h * C_t, 0)
                if D is not None:
                    y += skip * x
                slope = opening * (1 + gate * (1 - opening))
                tl.store(grad_z + t * grad_z_stride, g * y * slope, there)
                g *= gate * opening
            by_y = by_y + (g,)
            for_C = h * g[None, :]
            if len(C) == 1:
                sum_C += for_C
            else:
                line = ((batch * blocks + block) * length + t) * STATES
                tl.store(grad_C + line + n, tl.sum(for_C, 1), in_n & exists)
        for i in tl.static_range(STRIDE - 1, -1, -1):
            if first + j * STRIDE + i < length:
                t = time(first + j * STRIDE + i, length, REVERSE)
                # Loaded anew, as exp2(Δ A) of all STRIDE steps does not fit beside the states.
                raw = tl.load(delta + t * delta_stride, in_d, 0).to(DTYPE) + bias
                x = tl.load(u + t * u_stride, in_d, 0).to(DTYPE)
                step = softplus(raw) if SOFTPLUS else raw
                g = by_y[i]
                B_t = matrix_at(B, t, in_n, DTYPE)
                # The whole gradient of h_t, and what of it flows on to h_{t−1}.
                by_h = flow + g[None, :] * matrix_at(C, t, in_n, DTYPE)
                flow = tl.exp2(step[None, :] * A) * by_h
                by_exponent = flow * before[i]  # gradient of Δ_t A
                by_input = tl.sum(by_h * B_t, 0)  # gradient of Δ_t u_t
                by_step = by_input * x + tl.sum(by_exponent * A, 0) * LN2
                if SOFTPLUS:
                    by_step *= tl.sigmoid(raw)
                by_x = by_input * step
                if D is not None:
                    by_x += skip * g
                tl.store(grad_u + t * grad_u_stride, by_x, in_d)
                tl.store(grad_delta + t * grad_delta_stride, by_step, in_d)
                sum_A += by_exponent * step[None, :]
                sum_D += g * x
                sum_bias += by_step
                for_B = by_h * (step * x)[None, :]
                if len(B) == 1:
                    sum_B += for_B
                else:
                    line = ((batch * blocks + block) * length + t) * STATES
                    tl.store(grad_B + line + n, tl.sum(for_B, 1), in_n)

    tl.store(grad_A + tile, sum_A, in_tile)
    if len(B) == 1:
        tl.store(grad_B + tile, sum_B, in_tile)
    if len(C) == 1:
        tl.store(grad_C + tile, sum_C, in_tile)
    if D is not None:
        tl.store(grad_D + row * channels + d, sum_D, in_d)
    if delta_bias is not None:
        tl.store(grad_bias + row * channels + d, sum_bias, in_d)
