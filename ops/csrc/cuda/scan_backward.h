// The gradients of the scan.
//
// Per segment between two checkpoints, from the last to the first, in two passes. `record` computes
// the states again and leaves those before every kHold-th step in shared memory. `retreat` starts
// from there, kHold steps at a time, the last ones first: states and decays of these in registers,
// then the adjoint recurrence back over them. With g the gradient of y, G_t = C_t g_t + X_{t+1} the
// gradient that reaches h_t and X_t = exp(Δ_t A) G_t what goes on to h_{t-1}:
//   ∂B_t = G_t Δ_t u_t   ∂C_t = h_t g_t   ∂(Δ_t u_t) = B_t · G_t   ∂(Δ_t A) = X_t h_{t-1}
// Sums over channels are taken within a block and written per block, sums over time per chunk; a
// kernel of its own adds those up. There are no atomics: results do not depend on the order of
// execution.
#pragma once
#include "scan_forward.h"

namespace mmvim {

constexpr int kTiles = kSegment / kSteps;

// As Element, with the gradient of y.
struct alignas(16) GradElement {
  float delta, value, g, unused;
};

template <class Shape> struct BackwardMemory {
  static constexpr int kMatrix = kSteps * Shape::kPitch, kBuffers = Shape::kBuffers;
  static constexpr int kElements = kSteps * Shape::kChannels;                  // of a warp
  static constexpr int kStarts = kSegment / Shape::kHold * Shape::S * 32;
  static constexpr int kSumsPitch = 2 * Shape::kStates + 8;    // neighbours in different banks
  static constexpr int kSums = kSteps * kSumsPitch;
  float* matrices;           // (buffers, 2, steps, pitch)
  GradElement* elements;     // of this warp: (buffers, steps, channels)
  float* starts;             // of this warp: (holds of a segment, S, lanes)
  float* sums;               // of all warps: (warps, steps, pitch)

  __device__ BackwardMemory(const Place<Shape>& place, float4* memory) {
    const int warps = place.threads / 32;
    matrices = reinterpret_cast<float*>(memory) + place.direction * floats(warps);
    auto all = reinterpret_cast<GradElement*>(matrices + kBuffers * 2 * kMatrix);
    elements = all + place.warp * kBuffers * kElements;
    starts = reinterpret_cast<float*>(all + warps * kBuffers * kElements);
    sums = starts + warps * kStarts;
    starts += place.warp * kStarts;
  }
  __device__ float* matrix(int buffer, int which) const {
    return matrices + (buffer * 2 + which) * kMatrix;
  }
  __device__ GradElement* tile(int buffer) const { return elements + buffer * kElements; }

  __host__ __device__ static int floats(int64_t warps) {
    return kBuffers * 2 * kMatrix + int(warps) * (4 * kBuffers * kElements + kStarts + kSums);
  }
};

// Sum values over the lanes of a warp that have different channels. What is left in x[0 … kCount /
// kChannels) belongs to the values from the returned index on.
template <class Shape, int kCount>
__device__ __forceinline__ int sum_rows(float (&x)[kCount], int lane) {
  static_assert(kCount % Shape::kChannels == 0, "");
  int index = 0;
#pragma unroll
  for (int mask = 16, count = kCount / 2; mask >= Shape::P; mask /= 2, count /= 2) {
    bool upper = lane & mask;
#pragma unroll
    for (int i = 0; i < count; i++) {
      float keep = upper ? x[i + count] : x[i], send = upper ? x[i] : x[i + count];
      x[i] = keep + shuffle_xor(send, mask);
    }
    index += upper ? count : 0;
  }
  return index;
}

template <class Shape> constexpr int kBackwardThreads = Shape::kStates > 16 ? 128 : 384;

template <class T, class Shape, bool kConstant>
__global__ void __launch_bounds__(kBackwardThreads<Shape>)
scan_backward(const __grid_constant__ Scan scan) {
  MMVIM_SHARED(memory);
  using Memory = BackwardMemory<Shape>;
  constexpr int S = Shape::S, kOwn = Shape::kOwn, kHold = Shape::kHold;
  Place<Shape> place(scan, scan.splits);
  const Direction& direction = scan.direction[place.direction];
  const bool gated = scan.z.data != nullptr, two = scan.directions == 2;
  const int states = int(scan.states), split = place.split;
  const int tiles = (place.length + kSteps - 1) / kSteps;
  const float scale = float(scan.scale);
  const Memory shared(place, memory);
  MatrixLoader<T, Shape, false> matrix_B(direction.B, place, states),
      matrix_C(direction.C, place, states);
  Coefficients<T, Shape, kConstant> B(direction.B), C(direction.C);
  T raw_u[kOwn], raw_delta[kOwn], raw_g[kOwn], raw_z[kOwn];
  float A[S], X[S], h[S], grad_A[S];
  float grad_B[S], grad_C[S];     // of constant ones
  int buffer = 0;

  auto fetch = [&](int i, bool retreating) {
    const int steps = place.steps(i);
    matrix_B.fetch(i, steps);
    if (retreating) matrix_C.fetch(i, steps);
    Own<const T, Shape>(direction.u, place).load(i, raw_u);
    Own<const T, Shape>(direction.delta, place).load(i, raw_delta);
    if (retreating) Own<const T, Shape>(scan.grad_out, place).load(i, raw_g);
    if (retreating && gated) Own<const T, Shape>(scan.z, place).load(i, raw_z);
  };
  // Everybody has read what was in the buffer that is written next.
  auto next_buffer = [&] {
    if (Shape::kBuffers == 1) __syncthreads();
    else buffer ^= 1;
  };
  auto put = [&](int j, float delta, float value, float g) {
    if (Shape::P > kSteps && place.part >= kSteps) return;
    shared.tile(buffer)[place.own(j) * Shape::kChannels + place.row] = {delta, value, g, 0};
  };
  auto start = [&](int step_of_segment, int s) -> float& {
    return shared.starts[(step_of_segment / kHold * S + s) * 32 + place.lane];
  };
  // The gradient of B_t (0) or C_t (1) of kHold steps over the channels of a warp.
  auto write_sums = [&](int from, int which, float (&values)[kHold * S]) {
    const int index = sum_rows<Shape>(values, place.lane);
    float* to = shared.sums + place.warp * Memory::kSums + which * Shape::kStates + place.part * S;
#pragma unroll
    for (int i = 0; i < kHold * S / Shape::kChannels; i++) {
      const int k = (index + i) / S, s = (index + i) % S;
      to[(from + k) * Memory::kSumsPitch + s] = values[i];
    }
  };

  // The states of a tile again, from h on.
  auto record = [&](int i_of_segment) {
    const GradElement* elements = shared.tile(buffer);
    const float* tile_B = shared.matrix(buffer, 0);
#pragma unroll
    for (int t = 0; t < kSteps; t++) {
      if (t % kHold == 0)
#pragma unroll
        for (int s = 0; s < S; s++) start(i_of_segment * kSteps + t, s) = h[s];
      const GradElement element = elements[t * Shape::kChannels + place.row];
      alignas(16) float b[S];
      B.at(tile_B, t, place.part, b);
#pragma unroll
      for (int s = 0; s < S; s++)
        h[s] = fmaf(exp2(element.delta * A[s]), h[s], element.value * b[s]);
    }
  };
  // kHold steps from `from` on of a tile: there with the states, back with the adjoint. What
  // belongs to elements goes to their owners.
  auto retreat = [&](int i_of_segment, int from, float (&y)[kOwn], float (&by_value)[kOwn],
                     float (&by_delta)[kOwn]) {
    const GradElement* elements = shared.tile(buffer);
    const float *tile_B = shared.matrix(buffer, 0), *tile_C = shared.matrix(buffer, 1);
    float before[kHold][S], decay[kHold][S], products[kHold * S], sums[kQuad], others[kQuad];
#pragma unroll
    for (int s = 0; s < S; s++) h[s] = start(i_of_segment * kSteps + from, s);
#pragma unroll
    for (int k = 0; k < kHold; k++) {
      const GradElement element = elements[(from + k) * Shape::kChannels + place.row];
      alignas(16) float b[S], c[S];
      B.at(tile_B, from + k, place.part, b);
      C.at(tile_C, from + k, place.part, c);
      sums[k % kQuad] = 0;
#pragma unroll
      for (int s = 0; s < S; s++) {
        before[k][s] = h[s];
        decay[k][s] = exp2(element.delta * A[s]);
        h[s] = fmaf(decay[k][s], h[s], element.value * b[s]);
        sums[k % kQuad] = fmaf(h[s], c[s], sums[k % kQuad]);
        products[k * S + s] = h[s] * element.g;
        if constexpr (kConstant) grad_C[s] = fmaf(h[s], element.g, grad_C[s]);
      }
      if (k % kQuad == kQuad - 1 && gated) sum_to_owners(sums, place, from + k + 1 - kQuad, y);
    }
    if (!kConstant || direction.C.varying) write_sums(from, 1, products);
#pragma unroll
    for (int k = kHold - 1; k >= 0; k--) {
      const GradElement element = elements[(from + k) * Shape::kChannels + place.row];
      alignas(16) float b[S], c[S];
      B.at(tile_B, from + k, place.part, b);
      C.at(tile_C, from + k, place.part, c);
      sums[k % kQuad] = others[k % kQuad] = 0;
#pragma unroll
      for (int s = 0; s < S; s++) {
        float G = fmaf(c[s], element.g, X[s]);
        products[k * S + s] = G * element.value;
        if constexpr (kConstant) grad_B[s] = fmaf(G, element.value, grad_B[s]);
        sums[k % kQuad] = fmaf(G, b[s], sums[k % kQuad]);
        X[s] = decay[k][s] * G;
        float e = X[s] * before[k][s];
        grad_A[s] = fmaf(e, element.delta, grad_A[s]);
        others[k % kQuad] = fmaf(e, A[s], others[k % kQuad]);
      }
      if (k % kQuad == 0) {
        sum_to_owners(sums, place, from + k, by_value);
        sum_to_owners(others, place, from + k, by_delta);
      }
    }
    if (!kConstant || direction.B.varying) write_sums(from, 0, products);
  };
  // Sums over the channels of the block for B and C; the next block of channels adds to them.
  auto write_matrix = [&](const Matrix& m, float* to, int i, int which) {
    if (!m.varying) return;
    const int64_t row = (opaque(place.batch) * scan.groups + place.group) * scan.splits + split;
    const bool add = place.member > split * place.width;
    to += (row * scan.length + place.time(i * kSteps)) * states;
    const int warps = place.threads / 32, steps = place.steps(i);
    for (int e = place.thread; e < steps * Shape::kStates; e += place.threads) {
      int t = e / Shape::kStates, n = e % Shape::kStates;
      if (n >= states) continue;
      const float* from = shared.sums + t * Memory::kSumsPitch + which * Shape::kStates + n;
      float sum = 0;
      for (int w = 0; w < warps; w++) sum += from[w * Memory::kSums];
      int64_t at = place.step * t * states + n;
      to[at] = add ? to[at] + sum : sum;
    }
  };

  const int blocks = int(blocks_per_group(scan, place.width));
  for (int block = split; block < blocks; block += int(scan.splits)) {
    place.choose(scan, block);
    const float bias = load_channel(place, direction.delta_bias);
    const float skip = load_channel(place, direction.D);
    float sum_D = 0, sum_bias = 0;
    load_A(scan, place, A);
    B.choose(direction.B, place, states);
    C.choose(direction.C, place, states);
    load_states(scan, place, ends_of(scan, place), place.line, X);
    if (scan.chunks == 1 && direction.grad_last_state != nullptr)
      each_state(place, states, [&](int s, int64_t n) {
        X[s] = direction.grad_last_state[(place.batch * scan.channels + place.channel) * scan.states
                                         + n];
      });
#pragma unroll
    for (int s = 0; s < S; s++) grad_A[s] = grad_B[s] = grad_C[s] = 0;

    const int last_segment = (tiles - 1) / kTiles * kTiles;     // its first tile
    fetch(last_segment, false);
    for (int base = last_segment; base >= 0; base -= kTiles) {
      const int count = tiles - base < kTiles ? tiles - base : kTiles;
      const int64_t segments = (scan.length + kSegment - 1) / kSegment;
      const int64_t segment = (place.chunk * scan.chunk_length + base * kSteps) / kSegment;
      load_states(scan, place, direction.checkpoints, place.batch * segments + segment, h);
      for (int k = 0; k < count; k++) {
        const int i = base + k, steps = place.steps(i);
        next_buffer();
        matrix_B.store(i, steps, shared.matrix(buffer, 0));
#pragma unroll
        for (int j = 0; j < kOwn; j++) {
          const float raw = to_float(raw_delta[j]) + bias;
          const float delta = place.owns(j, steps) ? step_size(raw, scan.softplus) : 0.f;
          put(j, delta, delta * to_float(raw_u[j]), 0);
        }
        __syncthreads();
        if (k + 1 < count) fetch(i + 1, false);
        else fetch(i, true);
        record(k);
      }
      for (int k = count - 1; k >= 0; k--) {
        const int i = base + k, steps = place.steps(i);
        next_buffer();
        matrix_B.store(i, steps, shared.matrix(buffer, 0));
        matrix_C.store(i, steps, shared.matrix(buffer, 1));
        float u[kOwn], delta[kOwn], slope[kOwn], g[kOwn], by_z[kOwn], y[kOwn];
#pragma unroll
        for (int j = 0; j < kOwn; j++) {
          const float raw = to_float(raw_delta[j]) + bias;
          u[j] = to_float(raw_u[j]);
          delta[j] = place.owns(j, steps) ? step_size(raw, scan.softplus) : 0.f;
          slope[j] = scan.softplus ? sigmoid(raw) : 1.f;
          g[j] = to_float(raw_g[j]) * scale;
          if (gated) {
            const float z = to_float(raw_z[j]), s = sigmoid(z);
            by_z[j] = g[j] * s * fmaf(z, 1 - s, 1.f);
            g[j] *= z * s;
          }
          put(j, delta[j], delta[j] * u[j], g[j]);
        }
        __syncthreads();
        if (k > 0) fetch(i - 1, true);
        else if (base > 0) fetch(base - kTiles, false);
        float by_value[kOwn], by_delta[kOwn];
#pragma unroll
        for (int j = 0; j < kOwn; j++) y[j] = by_value[j] = by_delta[j] = 0;
#pragma unroll
        for (int from = kSteps - kHold; from >= 0; from -= kHold)
          retreat(k, from, y, by_value, by_delta);

        const ArrivalOrder order(place.length, i, true);
        const Arrival arrival = two ? order.all(steps) : Arrival::kSecond;
        const Own<float, Shape> all_partial(scan.partial, place);
        auto is_first = [&](int j) {
          return arrival == Arrival::kMixed ? order.is_first(place.own(j), place.direction)
                                            : arrival == Arrival::kFirst;
        };
#pragma unroll
        for (int j = 0; j < kOwn; j++) {
          if (!place.owns(j, steps)) continue;
          const float grad_delta = fmaf(by_value[j], u[j], by_delta[j] * kLn2) * slope[j];
          assign(Own<T, Shape>(direction.grad_delta, place).at(i, j), grad_delta);
          sum_bias += grad_delta;
          sum_D = fmaf(g[j], u[j], sum_D);
          assign(Own<T, Shape>(direction.grad_u, place).at(i, j),
                 fmaf(by_value[j], delta[j], skip * g[j]));
          if (!gated) continue;
          if (direction.D != nullptr) y[j] = fmaf(skip, u[j], y[j]);
          if (is_first(j)) all_partial.at(i, j) = y[j];
        }
        __syncthreads();     // the sums of all warps and the y of both directions are there
        if (gated) {
#pragma unroll
          for (int j = 0; j < kOwn; j++) {
            if (!place.owns(j, steps) || is_first(j)) continue;
            if (two) y[j] += all_partial.at(i, j);
            assign(Own<T, Shape>(scan.grad_z, place).at(i, j), y[j] * by_z[j]);
          }
        }
        write_matrix(direction.B, direction.grad_B, i, 0);
        write_matrix(direction.C, direction.grad_C, i, 1);
      }
    }
    store_states(scan, place, direction.grad_A, place.line, grad_A);
    if constexpr (kConstant) {
      if (!direction.B.varying) store_states(scan, place, direction.grad_B, place.line, grad_B);
      if (!direction.C.varying) store_states(scan, place, direction.grad_C, place.line, grad_C);
    }
    sum_D = sum_lanes<Shape>(sum_D), sum_bias = sum_lanes<Shape>(sum_bias);
    if (place.part == 0 && place.exists) {
      int64_t at = place.line * scan.channels + place.channel;
      if (direction.grad_D != nullptr) direction.grad_D[at] = sum_D;
      if (direction.grad_delta_bias != nullptr) direction.grad_delta_bias[at] = sum_bias;
    }
  }
}

}  // namespace mmvim
