// The scan, forward. The length is cut into chunks that run side by side: chunk_ends lets every
// chunk begin from zero and keeps only where it ends, carry takes the true states across the
// borders, scan_forward goes through every chunk from the right start. With one chunk the first two
// fall away. Backward uses the first two the other way round, for the gradients of the states.
#pragma once
#include "cells.h"
#include "tiles.h"

namespace mmvim {

// Of a block, at most: what the registers suffice for.
template <class Shape> constexpr int kForwardThreads = Shape::P == 2 ? 256 : 384;

__device__ __forceinline__ float step_size(float raw, bool with_softplus) {
  float soft = softplus(raw);     // no branch: elements go side by side
  return with_softplus ? soft : raw;
}

// What the recurrence needs of an element, besides B and C: Δ and Δ u; for the adjoint, Δ and the
// gradient of y.
struct alignas(8) Element {
  float delta, value;
};

// Shared memory of one direction. A tile of step i is written while tile i - 1 is still read, so
// there are two of each, and one barrier per tile suffices.
template <class Shape, int kMatrices> struct ForwardMemory {
  static constexpr int kSteps = Shape::kSteps, kMatrix = kSteps * Shape::kStates;
  static constexpr int kElements = kSteps * Cells<Shape>::kPitch, kSums = kSteps * Shape::kChannels;
  static constexpr int kWarp = 2 * kElements * int(sizeof(Element) / 4) + kSums;     // floats
  float* matrices;       // (2, matrices, steps, states)
  Element* elements;     // of this warp: (2, steps, pitch)
  float* sums;           // of this warp: (steps, channels)

  __device__ ForwardMemory(const Place<Shape>& place, float4* memory) {
    float* own = reinterpret_cast<float*>(memory) + place.direction * floats(place.threads / 32);
    matrices = own;
    own += 2 * kMatrices * kMatrix + place.warp * kWarp;
    elements = reinterpret_cast<Element*>(own);
    sums = own + kWarp - kSums;
  }
  __device__ float* matrix(int tile, int which) const {
    return matrices + ((tile & 1) * kMatrices + which) * kMatrix;
  }
  __device__ Element* tile(int i) const { return elements + (i & 1) * kElements; }

  __host__ __device__ static int floats(int64_t warps) {
    return 2 * kMatrices * kMatrix + int(warps) * kWarp;
  }
};

// What kAhead steps do to the states of a lane, h = decay · h + input. It depends on no state, so it
// is computed ahead, where it hides the latency of the exponentials.
template <class Shape> struct Transition {
  static constexpr int kAhead = Shape::kAhead;
  float decay[kAhead][Shape::S], input[kAhead][Shape::S];

  // `matrix` is B or C; elements from this lane's channel of the first step on, in rows of kPitch.
  template <int kPitch, class Coefficients, class E>
  __device__ __forceinline__ void prepare(const Coefficients& coefficients, const float* matrix,
                                          const E* elements, int from, int part,
                                          const float (&A)[Shape::S]) {
#pragma unroll
    for (int k = 0; k < kAhead; k++) {
      const E element = elements[(from + k) * kPitch];
      alignas(16) float m[Shape::S];
      coefficients.at(matrix, from + k, part, m);
#pragma unroll
      for (int s = 0; s < Shape::S; s++) {
        decay[k][s] = exp2(element.delta * A[s]);
        input[k][s] = element.value * m[s];
      }
    }
  }
};

// Where every chunk ends that begins from zero, and its sum of Δ. The adjoint begins at the other
// end, takes g, the gradient of y, and C in place of Δ u and B, and ends with the gradient of what
// the chunk begins with.
template <class T, class Shape, bool kConstant, bool kAdjoint>
__global__ void __launch_bounds__(kForwardThreads<Shape>)
chunk_ends(const __grid_constant__ Scan scan) {
  MMVIM_SHARED(memory);
  constexpr int S = Shape::S, kOwn = Shape::kOwn, kSteps = Shape::kSteps;
  constexpr int kPitch = Cells<Shape>::kPitch;
  const Place<Shape> place(scan, blocks_per_group(scan, scan.warps * Shape::kChannels));
  const Cells<Shape> cells(scan, place);
  const Direction& direction = scan.direction[place.direction];
  const Matrix& M = kAdjoint ? direction.C : direction.B;
  const bool gated = kAdjoint && scan.z.data != nullptr;
  const int states = int(scan.states), tiles = (place.length + kSteps - 1) / kSteps;
  const float scale = float(scan.scale);
  const ForwardMemory<Shape, 1> shared(place, memory);
  MatrixLoader<T, Shape, kConstant> matrix(M, place, states);
  Coefficients<T, Shape, kConstant> coefficients(M);
  const int start = kAdjoint ? tiles - 1 : 0;
  Stream<const T, Shape> all_x(kAdjoint ? scan.grad_out : direction.u, cells, start),
      all_delta(direction.delta, cells, start), all_z(scan.z, cells, start);
  alignas(16) T x[kOwn], raw[kOwn], z[kOwn];
  float A[S], h[S] = {}, bias[kOwn], sums[kOwn] = {};
  load_A(scan, place, A);
  cells.load(direction.delta_bias, bias);
  coefficients.choose(M, place, states);

  auto fetch = [&](int i) {
    const int steps = place.steps(i), next = kAdjoint ? -1 : 1;
    const bool there = cells.step < steps;
    matrix.fetch(i, steps);
    all_x.load(there, x), all_x.move(next);
    all_delta.load(there, raw), all_delta.move(next);
    if (gated) all_z.load(there, z), all_z.move(next);
  };
  fetch(start);
  for (int k = 0; k < tiles; k++) {
    const int i = kAdjoint ? tiles - 1 - k : k, steps = place.steps(i);
    matrix.store(i, steps, shared.matrix(k, 0));
    alignas(16) Element own[kOwn];
#pragma unroll
    for (int j = 0; j < kOwn; j++) {
      float delta = step_size(to_float(raw[j]) + bias[j], scan.softplus);
      delta = cells.step < steps ? delta : 0.f;
      float value = to_float(x[j]) * (kAdjoint ? scale : delta);
      if (gated) value *= to_float(z[j]) * sigmoid(to_float(z[j]));
      own[j] = {delta, value};
      sums[j] += delta;
    }
    Element* elements = shared.tile(k);
    if (cells.has_cells()) copy_words<kOwn>(elements + cells.step * kPitch + cells.column, own);
    __syncthreads();
    if (k + 1 < tiles) fetch(kAdjoint ? i - 1 : i + 1);
    const float* tile = shared.matrix(k, 0);
    elements += place.row;
    constexpr int kAhead = Shape::kAhead, kParts = kSteps / kAhead;
    auto first = [](int q) { return (kAdjoint ? kParts - 1 - q : q) * kAhead; };
    Transition<Shape> current, next;
    current.template prepare<kPitch>(coefficients, tile, elements, first(0), place.part, A);
#pragma unroll
    for (int q = 0; q < kParts; q++) {
      if (q + 1 < kParts)
        next.template prepare<kPitch>(coefficients, tile, elements, first(q + 1), place.part, A);
#pragma unroll
      for (int u = 0; u < kAhead; u++) {
        const int t = kAdjoint ? kAhead - 1 - u : u;
#pragma unroll
        for (int s = 0; s < S; s++)
          h[s] = kAdjoint ? current.decay[t][s] * (current.input[t][s] + h[s])
                          : fmaf(current.decay[t][s], h[s], current.input[t][s]);
      }
      current = next;
    }
  }
  const int64_t line = place.direction * scan.batch * scan.chunks + place.line;
  store_states(scan, place, scan.ends, line, h);
  sum_steps<Shape>(sums);
#pragma unroll
  for (int j = 0; j < kOwn; j++)
    if (cells.step == 0 && j < cells.left)
      scan.sums[line * scan.channels + cells.channel + j] = sums[j];
}

// Replaces the end of every chunk by what it really begins with (the adjoint: what arrives at its
// end). One thread per direction, batch element, state and channel.
template <bool kAdjoint> __global__ void carry(const __grid_constant__ Scan scan) {
  int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  int64_t size = scan.states * scan.channels;
  if (i >= scan.directions * scan.batch * size) return;
  int64_t c = i % scan.channels, n = i / scan.channels % scan.states;
  int64_t batch = i / size % scan.batch, which = i / size / scan.batch;
  const Direction& direction = scan.direction[which];
  float A = scaled_A(direction.A[c * scan.states + n]), value = 0;
  if (kAdjoint && direction.grad_last_state != nullptr)
    value = direction.grad_last_state[(batch * scan.channels + c) * scan.states + n];
  bool backwards = bool(direction.reverse) != kAdjoint;
  for (int64_t k = 0; k < scan.chunks; k++) {
    int64_t chunk = backwards ? scan.chunks - 1 - k : k;
    int64_t line = (which * scan.batch + batch) * scan.chunks + chunk;
    float* end = scan.ends + line * size + n * scan.channels + c;
    float next = fmaf(exp2(scan.sums[line * scan.channels + c] * A), value, *end);
    *end = value;
    value = next;
  }
}

template <class T, class Shape, bool kConstant>
__global__ void __launch_bounds__(kForwardThreads<Shape>)
scan_forward(const __grid_constant__ Scan scan) {
  MMVIM_SHARED(memory);
  constexpr int S = Shape::S, kOwn = Shape::kOwn, kSteps = Shape::kSteps, kAhead = Shape::kAhead;
  constexpr int kPitch = Cells<Shape>::kPitch;
  const Place<Shape> place(scan, blocks_per_group(scan, scan.warps * Shape::kChannels));
  const Cells<Shape> cells(scan, place);
  const Direction& direction = scan.direction[place.direction];
  const bool gated = scan.z.data != nullptr, two = scan.directions == 2;
  const int states = int(scan.states), tiles = (place.length + kSteps - 1) / kSteps;
  const float scale = float(scan.scale);
  const ForwardMemory<Shape, 2> shared(place, memory);
  MatrixLoader<T, Shape, kConstant> matrix_B(direction.B, place, states),
      matrix_C(direction.C, place, states);
  Coefficients<T, Shape, kConstant> B(direction.B), C(direction.C);
  Stream<const T, Shape> all_u(direction.u, cells), all_delta(direction.delta, cells),
      all_z(scan.z, cells);
  Stream<T, Shape> all_out(scan.out, cells);
  Stream<float, Shape> all_partial(scan.partial, cells);
  alignas(16) T u[kOwn], raw[kOwn], z[kOwn];
  alignas(16) float other[kOwn];     // y of the other direction, where it came first
  float A[S], h[S], bias[kOwn], skip[kOwn];
  load_A(scan, place, A);
  cells.load(direction.delta_bias, bias);
  cells.load(direction.D, skip);
  B.choose(direction.B, place, states);
  C.choose(direction.C, place, states);
  load_states(scan, place, ends_of(scan, place), place.line, h);

  auto fetch = [&](int i) {
    const int steps = place.steps(i);
    matrix_B.fetch(i, steps);
    matrix_C.fetch(i, steps);
    all_u.load(cells.step < steps, u), all_u.move(1);
    all_delta.load(cells.step < steps, raw), all_delta.move(1);
  };
  fetch(0);
  for (int i = 0; i < tiles; i++) {
    const int steps = place.steps(i);
    matrix_B.store(i, steps, shared.matrix(i, 0));
    matrix_C.store(i, steps, shared.matrix(i, 1));
    const bool there = cells.step < steps;
    alignas(16) Element own[kOwn];
    float skipped[kOwn];
#pragma unroll
    for (int j = 0; j < kOwn; j++) {
      skipped[j] = skip[j] * to_float(u[j]);
      float delta = step_size(to_float(raw[j]) + bias[j], scan.softplus);
      delta = there ? delta : 0.f;
      own[j] = {delta, delta * to_float(u[j])};
    }
    Element* elements = shared.tile(i);
    if (cells.has_cells()) copy_words<kOwn>(elements + cells.step * kPitch + cells.column, own);
    __syncthreads();
    if (i + 1 < tiles) fetch(i + 1);
    const ArrivalOrder<kSteps> order(place.length, i, false);
    const Arrival arrival = two ? order.all(steps) : Arrival::kSecond;
    if (gated && arrival != Arrival::kFirst) all_z.load(there, z);
    if (two && arrival == Arrival::kSecond) all_partial.load(there, other);
    const int first = i * kSteps;
    if (direction.checkpoints != nullptr && first % kSegment == 0) {
      int64_t segments = (scan.length + kSegment - 1) / kSegment;
      int64_t segment = (place.chunk * scan.chunk_length + first) / kSegment;
      store_states(scan, place, direction.checkpoints, place.batch * segments + segment, h);
    }

    const float *tile_B = shared.matrix(i, 0), *tile_C = shared.matrix(i, 1);
    elements += place.row;
    Transition<Shape> current, next;
    float sums[kQuad];
    current.template prepare<kPitch>(B, tile_B, elements, 0, place.part, A);
#pragma unroll
    for (int from = 0; from < kSteps; from += kAhead) {
      if (from + kAhead < kSteps)
        next.template prepare<kPitch>(B, tile_B, elements, from + kAhead, place.part, A);
#pragma unroll
      for (int k = 0; k < kAhead; k++) {
        alignas(16) float c[S];
        C.at(tile_C, from + k, place.part, c);
        float& sum = sums[(from + k) % kQuad];
        sum = 0;
#pragma unroll
        for (int s = 0; s < S; s++) {
          h[s] = fmaf(current.decay[k][s], h[s], current.input[k][s]);
          sum = fmaf(h[s], c[s], sum);
        }
      }
      if ((from + kAhead) % kQuad == 0) write_sums(sums, place, from + kAhead - kQuad, shared.sums);
      current = next;
    }

    __syncwarp();     // for the sums; the next tile's come after a barrier
    alignas(16) float y[kOwn];
    copy_words<kOwn>(y, shared.sums + cells.step % kSteps * Shape::kChannels + cells.column);
    if (direction.D != nullptr)
#pragma unroll
      for (int j = 0; j < kOwn; j++) y[j] += skipped[j];
    auto gate = [&] {
#pragma unroll
      for (int j = 0; j < kOwn; j++) {
        if (two) y[j] += other[j];
        y[j] *= scale;
        if (gated) y[j] *= to_float(z[j]) * sigmoid(to_float(z[j]));
      }
    };
    if (arrival == Arrival::kFirst) {
      all_partial.store(there, y);
    } else if (arrival == Arrival::kSecond) {
      gate();
      all_out.store(there, y);
    } else {
      const bool comes_first = order.is_first(cells.step, place.direction);
      all_partial.store(there && comes_first, y);
      __syncthreads();     // for what has just been written
      all_partial.load(there, other);
      gate();
      all_out.store(there && !comes_first, y);
    }
    all_z.move(1), all_out.move(1), all_partial.move(1);
  }

  bool last = place.chunk == (direction.reverse ? 0 : scan.chunks - 1);
  if (direction.last_state != nullptr && last)
    each_state(place, states, [&](int s, int64_t n) {
      direction.last_state[(place.batch * scan.channels + place.channel) * scan.states + n] = h[s];
    });
}

// Bytes of shared memory of a block.
template <class Shape, int kMatrices> int64_t forward_bytes(int64_t warps, int64_t directions) {
  return 4 * ForwardMemory<Shape, kMatrices>::floats(warps) * directions;
}

// The ends of all chunks, and from them what they really begin with.
template <class T, class Shape, bool kConstant, bool kAdjoint>
const char* find_starts(const Scan& scan) {
  const int64_t blocks = scan.batch * scan.chunks * scan.groups
      * blocks_per_group(scan, scan.warps * Shape::kChannels);
  const char* error =
      launch(chunk_ends<T, Shape, kConstant, kAdjoint>, blocks, int(32 * scan.warps * scan.directions),
             forward_bytes<Shape, 1>(scan.warps, scan.directions), scan.stream, scan);
  if (error != nullptr) return error;
  const int64_t states = scan.directions * scan.batch * scan.states * scan.channels;
  return launch(carry<kAdjoint>, (states + 127) / 128, 128, 0, scan.stream, scan);
}

}  // namespace mmvim
