// The gradients of the scan.
//
// Per segment between two checkpoints, from the last to the first, in two passes. `record` computes
// the states again and leaves every fourth in shared memory. `retreat` starts from there, four
// steps at a time, the last ones first: states and decays of the four in registers, then the
// adjoint recurrence back over them. With g the gradient of y, G_t = C_t g_t + X_{t+1} the gradient
// that reaches h_t and X_t = exp(Δ_t A) G_t what goes on to h_{t-1}:
//   ∂B_t = G_t Δ_t u_t   ∂C_t = h_t g_t   ∂(Δ_t u_t) = B_t · G_t   ∂(Δ_t A) = X_t h_{t-1}
// Sums over channels are taken within a block and written per block, sums over time per chunk; the
// caller adds those up. There are no atomics: results do not depend on the order of execution.
#pragma once
#include "scan_forward.h"

namespace mmvim {

constexpr int kTiles = kSegment / kSteps;
constexpr int kStrides = kSegment / kStride;

template <class Shape> struct BackwardMemory {
  static constexpr int kPairs = Shape::R * Shape::S;
  float *B, *C, *starts, *sums;
  float *delta, *scaled, *g, *y, *grad_scaled, *grad_delta, *bias, *skip;

  __host__ __device__ BackwardMemory(int64_t warps, float* memory, int direction) {
    Layout<Shape> layout(warps);
    memory += direction * floats(warps);
    B = memory, C = B + layout.matrix;
    starts = C + layout.matrix;                                     // (kStrides, pairs, threads)
    sums = starts + kStrides * kPairs * 32 * int(warps);            // (warps, steps, 2, states)
    delta = sums + int(warps) * kSteps * 2 * Shape::kStates;
    scaled = delta + layout.sequence, g = scaled + layout.sequence, y = g + layout.sequence;
    grad_scaled = y + layout.sequence, grad_delta = grad_scaled + layout.sequence;
    bias = grad_delta + layout.sequence, skip = bias + int(warps) * Shape::kChannels;
  }
  __host__ __device__ static int floats(int64_t warps) {
    Layout<Shape> layout(warps);
    int per_warp = kStrides * kPairs * 32 + kSteps * 2 * Shape::kStates + 2 * Shape::kChannels;
    return (2 * layout.matrix + 6 * layout.sequence + int(warps) * per_warp + 3) / 4 * 4;
  }
};

// Sum S values over the lanes of a warp that have different channels. What is left in x[0 …
// kKept) belongs to the values from the returned index on.
template <class Shape>
__device__ __forceinline__ int sum_rows(float (&x)[Shape::S], int lane) {
  int index = 0;
#pragma unroll
  for (int mask = 16, count = Shape::S / 2; mask >= Shape::P; mask /= 2, count /= 2) {
    bool upper = lane & mask;
    if (count == 0) x[0] += shuffle_xor(x[0], mask);
#pragma unroll
    for (int i = 0; i < count; i++) {
      float keep = upper ? x[i + count] : x[i], send = upper ? x[i] : x[i + count];
      x[i] = keep + shuffle_xor(send, mask);
    }
    index += upper ? count : 0;
  }
  return index;
}

template <class T, class Shape, bool kConstant>
__global__ void __launch_bounds__(128) scan_backward(const __grid_constant__ Scan scan) {
  MMVIM_SHARED(memory);
  constexpr int R = Shape::R, S = Shape::S, kElements = Shape::kElements;
  Place<Shape> place(scan, scan.splits);
  const Direction& direction = scan.direction[place.direction];
  const bool gated = scan.z.data != nullptr, two = scan.directions == 2;
  const int states = int(scan.states), pitch = place.pitch, split = place.split;
  const int tiles = (place.length + kSteps - 1) / kSteps;
  const float scale = float(scan.scale);
  BackwardMemory<Shape> tile(scan.warps, reinterpret_cast<float*>(memory), place.direction);
  Piece<Shape> piece(place, direction.u);
  MatrixLoader<T, Shape, false> matrix_B(direction.B, place, states),
      matrix_C(direction.C, place, states);
  Coefficients<T, Shape, kConstant> B(direction.B, tile.B), C(direction.C, tile.C);
  alignas(16) T raw_u[kElements], raw_delta[kElements], raw_g[kElements], raw_z[kElements];
  float A[R][S], X[R][S], h[R][S], grad_A[R][S];
  float grad_B[kConstant ? R : 1][S], grad_C[kConstant ? R : 1][S];     // of constant ones

  auto steps_of = [&](int i) {
    int left = place.length - i * kSteps;
    return left < kSteps ? left : kSteps;
  };
  auto fetch = [&](int i, bool retreating) {
    int steps = steps_of(i), count = piece.count(steps);
    matrix_B.fetch(i, steps);
    if (retreating) matrix_C.fetch(i, steps);
    piece.template of<const T>(direction.u).load(i, count, raw_u);
    piece.template of<const T>(direction.delta).load(i, count, raw_delta);
    if (retreating) piece.template of<const T>(scan.grad_out).load(i, count, raw_g);
    if (retreating && gated) piece.template of<const T>(scan.z).load(i, count, raw_z);
  };
  auto store = [&](int i, bool retreating) {
    int steps = steps_of(i), count = piece.count(steps);
    matrix_B.store(i, steps, tile.B);
    if (retreating) matrix_C.store(i, steps, tile.C);
    put_steps(piece, count, raw_u, raw_delta, tile.bias, scan.softplus, tile.delta, tile.scaled);
    if (!retreating) return;
    put_skipped(piece, raw_u, tile.skip, direction.D != nullptr, tile.y);
    alignas(16) float g[kElements];
#pragma unroll
    for (int j = 0; j < kElements; j++) {
      g[j] = to_float(raw_g[j]) * scale;
      if (gated) g[j] *= to_float(raw_z[j]) * sigmoid(to_float(raw_z[j]));
    }
    piece.put(tile.g, g);
  };
  auto start = [&](int stride, int r, int s) -> float& {
    return tile.starts[(stride * R * S + r * S + s) * place.threads + place.thread];
  };

  // Four steps from `from` on of the tile: there with the states, back with the adjoint.
  auto retreat = [&](int stride, int from) {
    float before[kStride][R][S], decay[kStride][R][S], sums[R][kStride];
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
      for (int s = 0; s < S; s++) h[r][s] = start(stride, r, s);
    // The gradient of B_t (0) or C_t (1) over the channels of a warp.
    auto write_sums = [&](int t, int which, float (&values)[S]) {
      int index = sum_rows<Shape>(values, place.lane);
      float* to = tile.sums + ((place.warp * kSteps + t) * 2 + which) * Shape::kStates;
#pragma unroll
      for (int i = 0; i < Shape::kKept; i++) to[place.part * S + index + i] = values[i];
    };
#pragma unroll
    for (int k = 0; k < kStride; k++) {
      int t = from + k;
      float for_C[S] = {};
#pragma unroll
      for (int r = 0; r < R; r++) sums[r][k] = 0;
#pragma unroll
      for (int r = 0; r < R; r++) {
        int at = t * pitch + place.channel(r);
        float delta = tile.delta[at], x = tile.scaled[at], g = tile.g[at], b[S], c[S];
        B.at(t, r, place.part, b);
        C.at(t, r, place.part, c);
#pragma unroll
        for (int s = 0; s < S; s++) {
          before[k][r][s] = h[r][s];
          decay[k][r][s] = exp2(delta * A[r][s]);
          h[r][s] = fmaf(decay[k][r][s], h[r][s], x * b[s]);
          sums[r][k] = fmaf(h[r][s], c[s], sums[r][k]);
          for_C[s] = fmaf(h[r][s], g, for_C[s]);
          if constexpr (kConstant) grad_C[r][s] = fmaf(h[r][s], g, grad_C[r][s]);
        }
      }
      if (!kConstant || direction.C.varying) write_sums(t, 1, for_C);
    }
    auto add = [&](float* to) {
#pragma unroll
      for (int r = 0; r < R; r++) {
        float sum = sum_parts<Shape>(sums[r], place.part);
        if (place.part < kStride) to[(from + place.part) * pitch + place.channel(r)] += sum;
      }
    };
    auto set = [&](float* to, const float (&values)[R][kStride]) {
#pragma unroll
      for (int r = 0; r < R; r++) {
        float sum = sum_parts<Shape>(values[r], place.part);
        if (place.part < kStride) to[(from + place.part) * pitch + place.channel(r)] = sum;
      }
    };
    if (gated) add(tile.y);
    float by_scaled[R][kStride], by_delta[R][kStride];
#pragma unroll
    for (int k = kStride - 1; k >= 0; k--) {
      int t = from + k;
#pragma unroll
      for (int r = 0; r < R; r++) by_scaled[r][k] = by_delta[r][k] = 0;
      float for_B[S] = {};
#pragma unroll
      for (int r = 0; r < R; r++) {
        int at = t * pitch + place.channel(r);
        float delta = tile.delta[at], x = tile.scaled[at], g = tile.g[at], b[S], c[S];
        B.at(t, r, place.part, b);
        C.at(t, r, place.part, c);
#pragma unroll
        for (int s = 0; s < S; s++) {
          float G = fmaf(c[s], g, X[r][s]);
          for_B[s] = fmaf(G, x, for_B[s]);
          if constexpr (kConstant) grad_B[r][s] = fmaf(G, x, grad_B[r][s]);
          by_scaled[r][k] = fmaf(G, b[s], by_scaled[r][k]);
          X[r][s] = decay[k][r][s] * G;
          float e = X[r][s] * before[k][r][s];
          grad_A[r][s] = fmaf(e, delta, grad_A[r][s]);
          by_delta[r][k] = fmaf(e, A[r][s], by_delta[r][k]);
        }
      }
      if (!kConstant || direction.B.varying) write_sums(t, 0, for_B);
    }
    set(tile.grad_scaled, by_scaled);
    set(tile.grad_delta, by_delta);
  };

  // The gradient of z, which needs y of all directions; as in the forward pass.
  auto finish_z = [&](int i, int steps) {
    const int count = piece.count(steps);
    const ArrivalOrder order(place.length, i, true);
    const Arrival arrival = two ? order.all(steps) : Arrival::kSecond;
    const auto all_partial = piece.template of<float>(scan.partial);
    alignas(16) T raw[kElements];
    alignas(16) float y[kElements], other[kElements];
    piece.get(tile.y, y);
    if (arrival == Arrival::kMixed) {
      all_partial.each(i, count, [&](int j, float& at) {
        if (order.is_first(piece.step(j), place.direction)) at = y[j];
      });
      __syncthreads();
    }
    if (arrival == Arrival::kFirst) return all_partial.store(i, count, y);
    if (two) all_partial.load(i, count, other);
    piece.template of<const T>(scan.grad_out).load(i, count, raw);
#pragma unroll
    for (int j = 0; j < kElements; j++) {
      if (two) y[j] += other[j];
      y[j] *= to_float(raw[j]) * scale;
    }
    piece.template of<const T>(scan.z).load(i, count, raw);
#pragma unroll
    for (int j = 0; j < kElements; j++) {
      float z = to_float(raw[j]), s = sigmoid(z);
      y[j] *= s * fmaf(z, 1 - s, 1.f);
    }
    const auto all_grad_z = piece.template of<T>(scan.grad_z);
    if (arrival == Arrival::kSecond) return all_grad_z.store(i, count, y);
    all_grad_z.each(i, count, [&](int j, T& at) {
      if (!order.is_first(piece.step(j), place.direction)) assign(at, y[j]);
    });
  };
  // Gradients of the elements of a tile, once the sums over states are known.
  auto finish = [&](int i, int steps) {
    const int count = piece.count(steps);
    alignas(16) T raw[kElements];
    alignas(16) float by_delta[kElements], by_u[kElements], g[kElements], values[kElements];
    piece.template of<const T>(direction.delta).load(i, count, raw);
    piece.get_channels(tile.bias, values);
    piece.get(tile.grad_delta, by_delta);
#pragma unroll
    for (int j = 0; j < kElements; j++) {
      float slope = sigmoid(to_float(raw[j]) + values[j]);
      values[j] = scan.softplus ? slope : 1.f;
    }
    piece.template of<const T>(direction.u).load(i, count, raw);
    piece.get(tile.grad_scaled, by_u);
#pragma unroll
    for (int j = 0; j < kElements; j++)
      by_delta[j] = fmaf(by_u[j], to_float(raw[j]), by_delta[j] * kLn2) * values[j];
    piece.template of<T>(direction.grad_delta).store(i, count, by_delta);
    piece.put(tile.grad_delta, by_delta);
    piece.get(tile.delta, values);
    piece.get(tile.g, g);
#pragma unroll
    for (int j = 0; j < kElements; j++) {
      by_u[j] *= values[j];
      values[j] = g[j] * to_float(raw[j]);
    }
    piece.put(tile.scaled, values);
    if (direction.D != nullptr) {
      piece.get_channels(tile.skip, values);
#pragma unroll
      for (int j = 0; j < kElements; j++) by_u[j] = fmaf(values[j], g[j], by_u[j]);
    }
    piece.template of<T>(direction.grad_u).store(i, count, by_u);
    if (gated) finish_z(i, steps);
    __syncthreads();
  };
  // Sums over the channels of the block for B and C; the next block of channels adds to them.
  auto write_matrix = [&](const Matrix& m, float* to, int first, int steps, int which) {
    if (!m.varying) return;
    const int64_t row = (opaque(place.batch) * scan.groups + place.group) * scan.splits + split;
    const bool add = place.member > split * place.width;
    to += (row * scan.length + place.time(first)) * states;
    const int warps = place.threads / 32;
    for (int e = place.thread; e < steps * Shape::kStates; e += place.threads) {
      int t = e / Shape::kStates, n = e % Shape::kStates;
      if (n >= states) continue;
      const float* from = tile.sums + (t * 2 + which) * Shape::kStates + n;
      float sum = 0;
#pragma unroll 1
      for (int w = 0; w < warps; w++) sum += from[w * kSteps * 2 * Shape::kStates];
      int64_t at = place.step * t * states + n;
      to[at] = add ? to[at] + sum : sum;
    }
  };
  auto write_states = [&](float* to, const float (&values)[R][S]) {
    store_states(scan, place, to, place.line, values);
  };

  const int blocks = int(blocks_per_group(scan, place.width));
  for (int block = split; block < blocks; block += int(scan.splits)) {
    place.choose(scan, block);
    float sum_D = 0, sum_bias = 0;      // of channel `thread`
    load_A(scan, place, A);
    B.choose(direction.B, place, states);
    C.choose(direction.C, place, states);
    __syncthreads();      // the last block of channels is done with these
    load_vector(place, direction.delta_bias, tile.bias);
    load_vector(place, direction.D, tile.skip);
    load_states(scan, place, ends_of(scan, place), place.line, X);
    if (scan.chunks == 1 && direction.grad_last_state != nullptr)
      each_state(place, states, [&](int r, int s, int64_t c, int64_t n) {
        X[r][s] = direction.grad_last_state[(place.batch * scan.channels + c) * scan.states + n];
      });
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
      for (int s = 0; s < S; s++) {
        grad_A[r][s] = 0;
        if constexpr (kConstant) grad_B[r][s] = grad_C[r][s] = 0;
      }

    int last_tile = (tiles - 1) / kTiles * kTiles;    // first of the last segment
    fetch(last_tile, false);
    for (int base = last_tile; base >= 0; base -= kTiles) {
      const int count = tiles - base < kTiles ? tiles - base : kTiles;
      int64_t segments = (scan.length + kSegment - 1) / kSegment;
      int64_t segment = (place.chunk * scan.chunk_length + base * kSteps) / kSegment;
      load_states(scan, place, direction.checkpoints, place.batch * segments + segment, h);
      for (int i = 0; i < count; i++) {
        const int steps = steps_of(base + i);
        __syncthreads();
        store(base + i, false);
        __syncthreads();
        if (i + 1 < count) fetch(base + i + 1, false);
        else fetch(base + i, true);
#pragma unroll 1
        for (int from = 0; from < kSteps; from += kStride) {
#pragma unroll
          for (int r = 0; r < R; r++)
#pragma unroll
            for (int s = 0; s < S; s++) start((i * kSteps + from) / kStride, r, s) = h[r][s];
#pragma unroll
          for (int k = 0; k < kStride; k++) {
            int t = from + k;
#pragma unroll
            for (int r = 0; r < R; r++) {
              int at = t * pitch + place.channel(r);
              float b[S];
              B.at(t, r, place.part, b);
              advance<Shape>(tile.delta[at], tile.scaled[at], A[r], b, h[r]);
            }
          }
        }
      }
      for (int i = count - 1; i >= 0; i--) {
        const int steps = steps_of(base + i);
        __syncthreads();
        store(base + i, true);
        __syncthreads();
#pragma unroll 1
        for (int from = (steps - 1) / kStride * kStride; from >= 0; from -= kStride)
          retreat((i * kSteps + from) / kStride, from);
        // Not before, as registers are short; behind this comes enough to wait for it.
        if (i > 0) fetch(base + i - 1, true);
        else if (base > 0) fetch(base - kTiles, false);
        __syncthreads();
        finish(base + i, steps);
        if (place.thread < place.width)
          for (int t = 0; t < steps; t++) {
            sum_D += tile.scaled[t * pitch + place.thread];
            sum_bias += tile.grad_delta[t * pitch + place.thread];
          }
        write_matrix(direction.B, direction.grad_B, (base + i) * kSteps, steps, 0);
        write_matrix(direction.C, direction.grad_C, (base + i) * kSteps, steps, 1);
      }
    }
    write_states(direction.grad_A, grad_A);
    if constexpr (kConstant) {
      if (!direction.B.varying) write_states(direction.grad_B, grad_B);
      if (!direction.C.varying) write_states(direction.grad_C, grad_C);
    }
    if (place.thread < place.channels) {
      int64_t at = place.line * scan.channels + place.first_channel + place.thread;
      if (direction.grad_D != nullptr) direction.grad_D[at] = sum_D;
      if (direction.grad_delta_bias != nullptr) direction.grad_delta_bias[at] = sum_bias;
    }
  }
}

}  // namespace mmvim
