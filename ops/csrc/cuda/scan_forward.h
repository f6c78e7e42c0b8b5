// The scan, forward. The length is cut into chunks that run side by side: chunk_ends lets every
// chunk begin from zero and keeps only where it ends, carry takes the true states across the
// borders, scan_forward goes through every chunk from the right start. With one chunk the first two
// fall away. Backward uses the first two the other way round, for the gradients of the states.
#pragma once
#include "tiles.h"

namespace mmvim {

constexpr int kForwardThreads = 384;     // of a block, at most

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
  static constexpr int kMatrix = kSteps * Shape::kPitch;
  static constexpr int kElements = kSteps * Shape::kChannels;     // of a warp
  float* matrices;       // (2, matrices, steps, pitch)
  Element* elements;     // of this warp: (2, steps, channels)

  __device__ ForwardMemory(const Place<Shape>& place, float4* memory) {
    float* own = reinterpret_cast<float*>(memory) + place.direction * floats(place.threads / 32);
    matrices = own;
    elements = reinterpret_cast<Element*>(own + 2 * kMatrices * kMatrix)
        + place.warp * 2 * kElements;
  }
  __device__ float* matrix(int tile, int which) const {
    return matrices + ((tile & 1) * kMatrices + which) * kMatrix;
  }
  __device__ Element* tile(int i) const { return elements + (i & 1) * kElements; }

  __host__ __device__ static int floats(int64_t warps) {
    return 2 * kMatrices * kMatrix + int(warps) * 2 * kElements * int(sizeof(Element) / 4);
  }
};

// Where every chunk ends that begins from zero, and its sum of Δ. The adjoint begins at the other
// end, takes g, the gradient of y, and C in place of Δ u and B, and ends with the gradient of what
// the chunk begins with.
template <class T, class Shape, bool kConstant, bool kAdjoint>
__global__ void __launch_bounds__(kForwardThreads) chunk_ends(const __grid_constant__ Scan scan) {
  MMVIM_SHARED(memory);
  constexpr int S = Shape::S, kOwn = Shape::kOwn;
  Place<Shape> place(scan, blocks_per_group(scan, scan.warps * Shape::kChannels));
  const Direction& direction = scan.direction[place.direction];
  const Matrix& M = kAdjoint ? direction.C : direction.B;
  const bool gated = kAdjoint && scan.z.data != nullptr;
  const int states = int(scan.states), tiles = (place.length + kSteps - 1) / kSteps;
  const float scale = float(scan.scale), bias = load_channel(place, direction.delta_bias);
  const ForwardMemory<Shape, 1> shared(place, memory);
  MatrixLoader<T, Shape, true> matrix(M, place, states);
  Coefficients<T, Shape, kConstant> coefficients(M);
  const Own<const T, Shape> all_x(kAdjoint ? scan.grad_out : direction.u, place),
      all_delta(direction.delta, place), all_z(scan.z, place);
  T x[kOwn], raw[kOwn], z[kOwn];
  float A[S], h[S] = {}, sum = 0;
  load_A(scan, place, A);
  coefficients.choose(M, place, states);

  auto fetch = [&](int i) {
    const int steps = place.steps(i);
    matrix.fetch(i, steps);
    all_x.load(i, x);
    all_delta.load(i, raw);
    if (gated) all_z.load(i, z);
  };
  fetch(kAdjoint ? tiles - 1 : 0);
  for (int k = 0; k < tiles; k++) {
    const int i = kAdjoint ? tiles - 1 - k : k, steps = place.steps(i);
    matrix.store(i, steps, shared.matrix(k, 0));
    Element* elements = shared.tile(k);
#pragma unroll
    for (int j = 0; j < kOwn; j++) {
      if (Shape::P > kSteps && place.part >= kSteps) break;
      float delta = place.owns(j, steps) ? step_size(to_float(raw[j]) + bias, scan.softplus) : 0.f;
      float value = to_float(x[j]) * (kAdjoint ? scale : delta);
      if (gated) value *= to_float(z[j]) * sigmoid(to_float(z[j]));
      elements[place.own(j) * Shape::kChannels + place.row] = {delta, value};
      sum += delta;
    }
    __syncthreads();
    if (k + 1 < tiles) fetch(kAdjoint ? i - 1 : i + 1);
    const float* tile = shared.matrix(k, 0);
#pragma unroll 8
    for (int u = 0; u < kSteps; u++) {
      const int t = kAdjoint ? kSteps - 1 - u : u;
      const Element element = elements[t * Shape::kChannels + place.row];
      alignas(16) float m[S];
      coefficients.at(tile, t, place.part, m);
#pragma unroll
      for (int s = 0; s < S; s++) {
        float decay = exp2(element.delta * A[s]);
        h[s] = kAdjoint ? decay * fmaf(element.value, m[s], h[s])
                        : fmaf(decay, h[s], element.value * m[s]);
      }
    }
  }
  const int64_t line = place.direction * scan.batch * scan.chunks + place.line;
  store_states(scan, place, scan.ends, line, h);
  sum = sum_lanes<Shape>(sum);
  if (place.part == 0 && place.exists) scan.sums[line * scan.channels + place.channel] = sum;
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
__global__ void __launch_bounds__(kForwardThreads) scan_forward(const __grid_constant__ Scan scan) {
  MMVIM_SHARED(memory);
  constexpr int S = Shape::S, kOwn = Shape::kOwn;
  Place<Shape> place(scan, blocks_per_group(scan, scan.warps * Shape::kChannels));
  const Direction& direction = scan.direction[place.direction];
  const bool gated = scan.z.data != nullptr, two = scan.directions == 2;
  const int states = int(scan.states), tiles = (place.length + kSteps - 1) / kSteps;
  const float scale = float(scan.scale), bias = load_channel(place, direction.delta_bias),
              skip = load_channel(place, direction.D);
  const ForwardMemory<Shape, 2> shared(place, memory);
  MatrixLoader<T, Shape, true> matrix_B(direction.B, place, states),
      matrix_C(direction.C, place, states);
  Coefficients<T, Shape, kConstant> B(direction.B), C(direction.C);
  const Own<const T, Shape> all_u(direction.u, place), all_delta(direction.delta, place),
      all_z(scan.z, place);
  const Own<T, Shape> all_out(scan.out, place);
  const Own<float, Shape> all_partial(scan.partial, place);
  T u[kOwn], raw[kOwn], z[kOwn];
  float A[S], h[S], other[kOwn];     // other: y of the other direction, where it came first
  load_A(scan, place, A);
  B.choose(direction.B, place, states);
  C.choose(direction.C, place, states);
  load_states(scan, place, ends_of(scan, place), place.line, h);

  auto fetch = [&](int i) {
    const int steps = place.steps(i);
    matrix_B.fetch(i, steps);
    matrix_C.fetch(i, steps);
    all_u.load(i, u);
    all_delta.load(i, raw);
  };
  fetch(0);
  for (int i = 0; i < tiles; i++) {
    const int steps = place.steps(i);
    matrix_B.store(i, steps, shared.matrix(i, 0));
    matrix_C.store(i, steps, shared.matrix(i, 1));
    Element* elements = shared.tile(i);
    float y[kOwn], skipped[kOwn];
#pragma unroll
    for (int j = 0; j < kOwn; j++) {
      skipped[j] = skip * to_float(u[j]), y[j] = 0;
      if (Shape::P > kSteps && place.part >= kSteps) break;
      float delta = place.owns(j, steps) ? step_size(to_float(raw[j]) + bias, scan.softplus) : 0.f;
      elements[place.own(j) * Shape::kChannels + place.row] = {delta, delta * to_float(u[j])};
    }
    __syncthreads();
    if (i + 1 < tiles) fetch(i + 1);
    const ArrivalOrder order(place.length, i, false);
    const Arrival arrival = two ? order.all(steps) : Arrival::kSecond;
    if (gated && arrival != Arrival::kFirst) all_z.load(i, z);
    if (two && arrival == Arrival::kSecond) all_partial.load(i, other);
    const int first = i * kSteps;
    if (direction.checkpoints != nullptr && first % kSegment == 0) {
      int64_t segments = (scan.length + kSegment - 1) / kSegment;
      int64_t segment = (place.chunk * scan.chunk_length + first) / kSegment;
      store_states(scan, place, direction.checkpoints, place.batch * segments + segment, h);
    }

    const float *tile_B = shared.matrix(i, 0), *tile_C = shared.matrix(i, 1);
#pragma unroll
    for (int from = 0; from < kSteps; from += kQuad) {
      float sums[kQuad];
#pragma unroll
      for (int k = 0; k < kQuad; k++) {
        const Element element = elements[(from + k) * Shape::kChannels + place.row];
        alignas(16) float b[S], c[S];
        B.at(tile_B, from + k, place.part, b);
        C.at(tile_C, from + k, place.part, c);
        sums[k] = 0;
#pragma unroll
        for (int s = 0; s < S; s++) {
          h[s] = fmaf(exp2(element.delta * A[s]), h[s], element.value * b[s]);
          sums[k] = fmaf(h[s], c[s], sums[k]);
        }
      }
      sum_to_owners(sums, place, from, y);
    }

    auto is_first = [&](int j) {
      return arrival == Arrival::kMixed ? order.is_first(place.own(j), place.direction)
                                        : arrival == Arrival::kFirst;
    };
#pragma unroll
    for (int j = 0; j < kOwn; j++) {
      if (direction.D != nullptr) y[j] += skipped[j];
      if (place.owns(j, steps) && is_first(j)) all_partial.at(i, j) = y[j];
    }
    if (arrival == Arrival::kFirst) continue;
    if (arrival == Arrival::kMixed) __syncthreads();     // for what has just been written
#pragma unroll
    for (int j = 0; j < kOwn; j++) {
      if (!place.owns(j, steps) || is_first(j)) continue;
      if (two) y[j] += arrival == Arrival::kMixed ? all_partial.at(i, j) : other[j];
      y[j] *= scale;
      if (gated) y[j] *= to_float(z[j]) * sigmoid(to_float(z[j]));
      assign(all_out.at(i, j), y[j]);
    }
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
