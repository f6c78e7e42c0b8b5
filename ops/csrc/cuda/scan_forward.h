// The scan, forward. The length is cut into chunks that run side by side: chunk_ends lets every
// chunk begin from zero and keeps only where it ends, carry takes the true states across the
// borders, scan_forward goes through every chunk from the right start. With one chunk the first two
// fall away. Backward uses the first two the other way round, for the gradients of the states.
#pragma once
#include "scan_common.h"

namespace mmvim {

// One step of the recurrence for the states of a lane: h = exp(Δ A) h + x m.
template <class Shape>
__device__ __forceinline__ void advance(float delta, float x, const float (&A)[Shape::S],
                                        const float (&m)[Shape::S], float (&h)[Shape::S]) {
#pragma unroll
  for (int s = 0; s < Shape::S; s++) h[s] = fmaf(exp2(delta * A[s]), h[s], x * m[s]);
}

__device__ __forceinline__ float step_size(float raw, float bias, bool with_softplus) {
  float plain = raw + bias, soft = softplus(plain);     // no branch: elements go side by side
  return with_softplus ? soft : plain;
}

// Per channel of the block: a vector of the arguments, zero where it is missing.
template <class Shape>
__device__ __forceinline__ void load_vector(const Place<Shape>& place, const float* from,
                                            float* to) {
  for (int c = place.thread; c < place.width; c += place.threads)
    to[c] = from != nullptr && c < place.channels ? from[place.first_channel + c] : 0.f;
}

template <class Shape> struct EndsMemory {
  float *matrix, *delta, *value, *bias;
  __host__ __device__ EndsMemory(int64_t warps, float* memory, int direction) {
    Layout<Shape> layout(warps);
    memory += direction * floats(warps);
    matrix = memory, delta = matrix + layout.matrix, value = delta + layout.sequence;
    bias = value + layout.sequence;
  }
  __host__ __device__ static int floats(int64_t warps) {
    Layout<Shape> layout(warps);
    return (layout.matrix + 2 * layout.sequence + int(warps) * Shape::kChannels + 3) / 4 * 4;
  }
};

// Where every chunk ends that begins from zero, and its sum of Δ. The adjoint begins at the other
// end, takes g, the gradient of y, and C in place of Δ u and B, and ends with the gradient of what
// the chunk begins with.
template <class T, class Shape, bool kConstant, bool kAdjoint>
__global__ void __launch_bounds__(128) chunk_ends(const __grid_constant__ Scan scan) {
  MMVIM_SHARED(memory);
  constexpr int R = Shape::R, S = Shape::S;
  Place<Shape> place(scan, blocks_per_group(scan, scan.warps * Shape::kChannels));
  const Direction& direction = scan.direction[place.direction];
  const Sequence& x = kAdjoint ? scan.grad_out : direction.u;
  const Matrix& M = kAdjoint ? direction.C : direction.B;
  const bool gated = kAdjoint && scan.z.data != nullptr;
  const int states = int(scan.states), tiles = (place.length + kSteps - 1) / kSteps;
  EndsMemory<Shape> tile(scan.warps, reinterpret_cast<float*>(memory), place.direction);
  Elements<Shape> elements(place, x);
  MatrixLoader<T, Shape> matrix(M);
  Coefficients<T, Shape, kConstant> coefficients(M, tile.matrix);
  T raw_x[Shape::kElements], raw_delta[Shape::kElements], raw_z[Shape::kElements];
  float A[R][S], h[R][S] = {}, sum[R] = {};
  load_A(scan, place, A);
  coefficients.choose(M, place, states);
  load_vector(place, direction.delta_bias, tile.bias);

  auto first_of = [&](int i) { return (kAdjoint ? tiles - 1 - i : i) * kSteps; };
  auto steps_of = [&](int i) {
    int left = place.length - first_of(i);
    return left < kSteps ? left : kSteps;
  };
  auto fetch = [&](int i) {
    int first = first_of(i), steps = steps_of(i);
    matrix.fetch(M, place, states, first, steps);
    auto x_at = elements.template walk<const T>(x, first / kSteps);
    auto delta_at = elements.template walk<const T>(direction.delta, first / kSteps);
    auto z_at = elements.template walk<const T>(scan.z, first / kSteps);
    elements.each(steps, [&](int j, int, int, int) {
      raw_x[j] = *x_at;
      raw_delta[j] = *delta_at;
      if (gated) raw_z[j] = *z_at;
    }, x_at, delta_at, z_at);
  };
  fetch(0);
  for (int i = 0; i < tiles; i++) {
    const int first = first_of(i), steps = steps_of(i);
    __syncthreads();     // everybody has read the last tile; the bias is there
    matrix.store(M, place, states, first, steps, tile.matrix);
    elements.every(steps, [&](int j, int at, int c, bool exists) {
      float value = 0, delta = 0;
      if (exists) {
        value = to_float(raw_x[j]);
        delta = step_size(to_float(raw_delta[j]), tile.bias[c], scan.softplus);
        if (!kAdjoint) value *= delta;
        else if (gated) value *= to_float(raw_z[j]) * sigmoid(to_float(raw_z[j]));
        if (kAdjoint) value *= float(scan.scale);
      }
      tile.delta[at] = delta;
      tile.value[at] = value;
    });
    __syncthreads();
    if (i + 1 < tiles) fetch(i + 1);
#pragma unroll 4
    for (int k = 0; k < steps; k++) {
      int t = kAdjoint ? steps - 1 - k : k;
#pragma unroll
      for (int r = 0; r < R; r++) {
        int at = t * (place.width + 1) + place.channel(r);
        float delta = tile.delta[at], value = tile.value[at], m[S];
        coefficients.at(t, r, place.part, m);
        sum[r] += delta;
#pragma unroll
        for (int s = 0; s < S; s++) {
          float decay = exp2(delta * A[r][s]);
          h[r][s] = kAdjoint ? decay * fmaf(value, m[s], h[r][s])
                             : fmaf(decay, h[r][s], value * m[s]);
        }
      }
    }
  }
  int64_t line = place.direction * scan.batch * scan.chunks + place.line;
  store_states(scan, place, scan.ends, line, h);
#pragma unroll
  for (int r = 0; r < R; r++) {
    int c = place.channel(r);
    if (place.part == 0 && c < place.channels)
      scan.sums[line * scan.channels + place.first_channel + c] = sum[r];
  }
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

template <class Shape> struct ForwardMemory {
  float *B, *C, *delta, *scaled, *y, *bias, *skip;
  __host__ __device__ ForwardMemory(int64_t warps, float* memory, int direction) {
    Layout<Shape> layout(warps);
    memory += direction * floats(warps);
    B = memory, C = B + layout.matrix, delta = C + layout.matrix;
    scaled = delta + layout.sequence, y = scaled + layout.sequence;
    bias = y + layout.sequence, skip = bias + int(warps) * Shape::kChannels;
  }
  __host__ __device__ static int floats(int64_t warps) {
    Layout<Shape> layout(warps);
    return (2 * layout.matrix + 3 * layout.sequence + 2 * int(warps) * Shape::kChannels + 3) / 4 * 4;
  }
};

template <class T, class Shape, bool kConstant>
__global__ void __launch_bounds__(128, Shape::P == 4 && !kConstant ? 3 : 1)
scan_forward(const __grid_constant__ Scan scan) {
  MMVIM_SHARED(memory);
  constexpr int R = Shape::R, S = Shape::S;
  Place<Shape> place(scan, blocks_per_group(scan, scan.warps * Shape::kChannels));
  const Direction& direction = scan.direction[place.direction];
  const bool gated = scan.z.data != nullptr, two = scan.directions == 2;
  const int states = int(scan.states), pitch = place.width + 1;
  const int tiles = (place.length + kSteps - 1) / kSteps;
  ForwardMemory<Shape> tile(scan.warps, reinterpret_cast<float*>(memory), place.direction);
  Elements<Shape> elements(place, direction.u);
  MatrixLoader<T, Shape> matrix_B(direction.B), matrix_C(direction.C);
  Coefficients<T, Shape, kConstant> B(direction.B, tile.B), C(direction.C, tile.C);
  T raw_u[Shape::kElements], raw_delta[Shape::kElements], raw_z[Shape::kElements];
  float other[Shape::kElements];     // y of the other direction, where it came first
  float A[R][S], h[R][S];
  load_A(scan, place, A);
  B.choose(direction.B, place, states);
  C.choose(direction.C, place, states);
  load_vector(place, direction.delta_bias, tile.bias);
  load_vector(place, direction.D, tile.skip);
  load_states(scan, place, ends_of(scan, place), place.line, h);
  __syncthreads();

  auto steps_of = [&](int i) {
    int left = place.length - i * kSteps;
    return left < kSteps ? left : kSteps;
  };
  auto fetch = [&](int i) {
    int steps = steps_of(i);
    matrix_B.fetch(direction.B, place, states, i * kSteps, steps);
    matrix_C.fetch(direction.C, place, states, i * kSteps, steps);
    auto u_at = elements.template walk<const T>(direction.u, i);
    auto delta_at = elements.template walk<const T>(direction.delta, i);
    elements.each(steps, [&](int j, int, int, int) {
      raw_u[j] = *u_at;
      raw_delta[j] = *delta_at;
    }, u_at, delta_at);
  };

  fetch(0);
  for (int i = 0; i < tiles; i++) {
    const int first = i * kSteps, steps = steps_of(i);
    // y is read by the thread that writes it here, the rest was read before the last barrier.
    matrix_B.store(direction.B, place, states, first, steps, tile.B);
    matrix_C.store(direction.C, place, states, first, steps, tile.C);
    elements.every(steps, [&](int j, int at, int c, bool exists) {
      float u = exists ? to_float(raw_u[j]) : 0.f, delta = 0;
      if (exists) delta = step_size(to_float(raw_delta[j]), tile.bias[c], scan.softplus);
      tile.delta[at] = delta;
      tile.scaled[at] = delta * u;
      tile.y[at] = direction.D == nullptr || !exists ? 0.f : tile.skip[c] * u;
    });
    __syncthreads();
    if (i + 1 < tiles) fetch(i + 1);
    const Visits visits(place.length, i, false);
    const Visit visit = two ? visits.all(steps) : Visit::kSecond;
    if (visit == Visit::kSecond) {
      auto z_at = elements.template walk<const T>(scan.z, i);
      auto partial_at = elements.template walk<float>(scan.partial, i);
      elements.each(steps, [&](int j, int, int, int) {
        if (gated) raw_z[j] = *z_at;
        if (two) other[j] = *partial_at;
      }, z_at, partial_at);
    }
    if (direction.checkpoints != nullptr && first % kSegment == 0) {
      int64_t segments = (scan.length + kSegment - 1) / kSegment;
      int64_t segment = (place.chunk * scan.chunk_length + first) / kSegment;
      store_states(scan, place, direction.checkpoints, place.batch * segments + segment, h);
    }

    auto stride = [&](int from) {
      float sums[R][kStride];
#pragma unroll
      for (int k = 0; k < kStride; k++) {
        int t = from + k;
#pragma unroll
        for (int r = 0; r < R; r++) sums[r][k] = 0;
#pragma unroll
        for (int r = 0; r < R; r++) {
          int at = t * pitch + place.channel(r);
          float b[S], c[S];
          B.at(t, r, place.part, b);
          C.at(t, r, place.part, c);
          advance<Shape>(tile.delta[at], tile.scaled[at], A[r], b, h[r]);
#pragma unroll
          for (int s = 0; s < S; s++) sums[r][k] = fmaf(h[r][s], c[s], sums[r][k]);
        }
      }
#pragma unroll
      for (int r = 0; r < R; r++) {
        float sum = sum_parts<Shape>(sums[r], place.part);
        if (place.part < kStride) tile.y[(from + place.part) * pitch + place.channel(r)] += sum;
      }
    };
#pragma unroll 1
    for (int from = 0; from < steps; from += kStride) stride(from);
    __syncthreads();

    auto z_at = elements.template walk<const T>(scan.z, i);
    auto partial_at = elements.template walk<float>(scan.partial, i);
    auto out_at = elements.template walk<T>(scan.out, i);
    auto finish = [&](float z, float y) {
      y *= float(scan.scale);
      if (gated) y *= z * sigmoid(z);
      assign(*out_at, y);
    };
    if (visit == Visit::kFirst) {
      elements.each(steps, [&](int, int at, int, int) { *partial_at = tile.y[at]; }, partial_at);
    } else if (visit == Visit::kSecond) {
      elements.each(steps, [&](int j, int at, int, int) {
        finish(gated ? to_float(raw_z[j]) : 0.f, two ? tile.y[at] + other[j] : tile.y[at]);
      }, out_at);
    } else {
      auto sum_at = partial_at;
      elements.each_in_turn(steps, [&](int, int at, int t, int) {
        if (visits.is_first(t, place.direction)) *partial_at = tile.y[at];
      }, partial_at);
      __syncthreads();
      elements.each_in_turn(steps, [&](int, int at, int t, int) {
        if (!visits.is_first(t, place.direction)) {
          float z = gated ? to_float(*z_at) : 0.f;
          finish(z, tile.y[at] + *sum_at);
        }
      }, z_at, sum_at, out_at);
    }
  }

  bool last = place.chunk == (direction.reverse ? 0 : scan.chunks - 1);
  if (direction.last_state != nullptr && last)
    each_state(place, states, [&](int r, int s, int64_t c, int64_t n) {
      direction.last_state[(place.batch * scan.channels + c) * scan.states + n] = h[r][s];
    });
}

// The ends of all chunks, and from them what they really begin with.
template <class T, class Shape, bool kConstant, bool kAdjoint>
const char* find_starts(const Scan& scan) {
  const int64_t blocks = scan.batch * scan.chunks * scan.groups
      * blocks_per_group(scan, scan.warps * Shape::kChannels);
  const char* error =
      launch(chunk_ends<T, Shape, kConstant, kAdjoint>, blocks, int(32 * scan.warps * scan.directions),
             4 * EndsMemory<Shape>::floats(scan.warps) * scan.directions, scan.stream, scan);
  if (error != nullptr) return error;
  const int64_t states = scan.directions * scan.batch * scan.states * scan.channels;
  return launch(carry<kAdjoint>, (states + 127) / 128, 128, 0, scan.stream, scan);
}

}  // namespace mmvim
