// The scan, forward. The length is cut into chunks that run side by side: chunk_ends lets every
// chunk begin from zero and keeps only where it ends, carry takes the true states across the
// borders, scan_forward goes through every chunk from the right start. With one chunk the first two
// fall away. Backward uses the first two the other way round, for the gradients of the states.
#pragma once
#include "tiles.h"

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

// Δ and Δ u of a thread's piece of a tile, into shared memory; steps that do not exist have Δ = 0.
template <class T, class Shape>
__device__ __forceinline__ void put_steps(const Piece<Shape>& piece, int count,
                                          const T (&u)[Shape::kElements],
                                          const T (&raw)[Shape::kElements], const float* bias,
                                          bool with_softplus, float* delta_tile,
                                          float* scaled_tile) {
  alignas(16) float delta[Shape::kElements], scaled[Shape::kElements], added[Shape::kElements];
  piece.get_channels(bias, added);
#pragma unroll
  for (int j = 0; j < Shape::kElements; j++) {
    float soft = step_size(to_float(raw[j]), added[j], with_softplus);
    delta[j] = j < count ? soft : 0.f;
    scaled[j] = delta[j] * to_float(u[j]);
  }
  piece.put(delta_tile, delta);
  piece.put(scaled_tile, scaled);
}

// D u of the same.
template <class T, class Shape>
__device__ __forceinline__ void put_skipped(const Piece<Shape>& piece,
                                            const T (&u)[Shape::kElements], const float* skip,
                                            bool with_skip, float* tile) {
  alignas(16) float y[Shape::kElements];
  piece.get_channels(skip, y);
#pragma unroll
  for (int j = 0; j < Shape::kElements; j++) y[j] = with_skip ? y[j] * to_float(u[j]) : 0.f;
  piece.put(tile, y);
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
  constexpr int R = Shape::R, S = Shape::S, kElements = Shape::kElements;
  Place<Shape> place(scan, blocks_per_group(scan, scan.warps * Shape::kChannels));
  const Direction& direction = scan.direction[place.direction];
  const Sequence& x = kAdjoint ? scan.grad_out : direction.u;
  const Matrix& M = kAdjoint ? direction.C : direction.B;
  const bool gated = kAdjoint && scan.z.data != nullptr;
  const int states = int(scan.states), tiles = (place.length + kSteps - 1) / kSteps;
  EndsMemory<Shape> tile(scan.warps, reinterpret_cast<float*>(memory), place.direction);
  Piece<Shape> piece(place, x);
  MatrixLoader<T, Shape, true> matrix(M, place, states);
  Coefficients<T, Shape, kConstant> coefficients(M, tile.matrix);
  alignas(16) T raw_x[kElements], raw_delta[kElements], raw_z[kElements];
  float A[R][S], h[R][S] = {}, sum[R] = {};
  load_A(scan, place, A);
  coefficients.choose(M, place, states);
  load_vector(place, direction.delta_bias, tile.bias);

  const auto all_x = piece.template of<const T>(x);
  const auto all_delta = piece.template of<const T>(direction.delta);
  const auto all_z = piece.template of<const T>(scan.z);
  auto steps_of = [&](int i) {
    int left = place.length - i * kSteps;
    return left < kSteps ? left : kSteps;
  };
  auto fetch = [&](int i) {
    int steps = steps_of(i), count = piece.count(steps);
    matrix.fetch(i, steps);
    all_x.load(i, count, raw_x);
    all_delta.load(i, count, raw_delta);
    if (gated) all_z.load(i, count, raw_z);
  };
  const int from = kAdjoint ? tiles - 1 : 0, to = kAdjoint ? -1 : tiles, next = kAdjoint ? -1 : 1;
  fetch(from);
  for (int i = from; i != to; i += next) {
    const int steps = steps_of(i), count = piece.count(steps);
    __syncthreads();     // everybody has read the last tile; the bias is there
    matrix.store(i, steps, tile.matrix);
    alignas(16) float value[kElements], delta[kElements], bias[kElements];
    piece.get_channels(tile.bias, bias);
#pragma unroll
    for (int j = 0; j < kElements; j++) {
      float soft = step_size(to_float(raw_delta[j]), bias[j], scan.softplus);
      delta[j] = j < count ? soft : 0.f;
      value[j] = to_float(raw_x[j]) * (kAdjoint ? float(scan.scale) : delta[j]);
      if (gated) value[j] *= to_float(raw_z[j]) * sigmoid(to_float(raw_z[j]));
    }
    piece.put(tile.delta, delta);
    piece.put(tile.value, value);
    __syncthreads();
    if (i + next != to) fetch(i + next);
#pragma unroll 4
    for (int k = 0; k < steps; k++) {
      int t = kAdjoint ? steps - 1 - k : k;
#pragma unroll
      for (int r = 0; r < R; r++) {
        int at = t * place.pitch + place.channel(r);
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
  constexpr int R = Shape::R, S = Shape::S, kElements = Shape::kElements;
  Place<Shape> place(scan, blocks_per_group(scan, scan.warps * Shape::kChannels));
  const Direction& direction = scan.direction[place.direction];
  const bool gated = scan.z.data != nullptr, two = scan.directions == 2;
  const int states = int(scan.states), pitch = place.pitch;
  const int tiles = (place.length + kSteps - 1) / kSteps;
  ForwardMemory<Shape> tile(scan.warps, reinterpret_cast<float*>(memory), place.direction);
  Piece<Shape> piece(place, direction.u);
  MatrixLoader<T, Shape, true> matrix_B(direction.B, place, states),
      matrix_C(direction.C, place, states);
  Coefficients<T, Shape, kConstant> B(direction.B, tile.B), C(direction.C, tile.C);
  const auto all_u = piece.template of<const T>(direction.u);
  const auto all_delta = piece.template of<const T>(direction.delta);
  const auto all_z = piece.template of<const T>(scan.z);
  const auto all_out = piece.template of<T>(scan.out);
  const auto all_partial = piece.template of<float>(scan.partial);
  alignas(16) T raw_u[kElements], raw_delta[kElements], raw_z[kElements];
  alignas(16) float other[kElements];     // y of the other direction, where it came first
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
    int steps = steps_of(i), count = piece.count(steps);
    matrix_B.fetch(i, steps);
    matrix_C.fetch(i, steps);
    all_u.load(i, count, raw_u);
    all_delta.load(i, count, raw_delta);
  };

  fetch(0);
  for (int i = 0; i < tiles; i++) {
    const int first = i * kSteps, steps = steps_of(i), count = piece.count(steps);
    // y is read by the thread that writes it here, the rest was read before the last barrier.
    matrix_B.store(i, steps, tile.B);
    matrix_C.store(i, steps, tile.C);
    put_steps(piece, count, raw_u, raw_delta, tile.bias, scan.softplus, tile.delta, tile.scaled);
    put_skipped(piece, raw_u, tile.skip, direction.D != nullptr, tile.y);
    __syncthreads();
    if (i + 1 < tiles) fetch(i + 1);
    const ArrivalOrder order(place.length, i, false);
    const Arrival arrival = two ? order.all(steps) : Arrival::kSecond;
    if (gated && arrival != Arrival::kFirst) all_z.load(i, count, raw_z);
    if (two && arrival == Arrival::kSecond) all_partial.load(i, count, other);
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

    alignas(16) float y[kElements];
    piece.get(tile.y, y);
    if (arrival == Arrival::kMixed) {     // the second ones wait until the first ones are there
      all_partial.each(i, count, [&](int j, float& at) {
        if (order.is_first(piece.step(j), place.direction)) at = y[j];
      });
      __syncthreads();
      all_partial.load(i, count, other);
    }
    if (arrival == Arrival::kFirst) {
      all_partial.store(i, count, y);
      continue;
    }
#pragma unroll
    for (int j = 0; j < kElements; j++) {
      float z = gated ? to_float(raw_z[j]) : 0.f;
      if (two) y[j] += other[j];
      y[j] *= float(scan.scale);
      if (gated) y[j] *= z * sigmoid(z);
    }
    if (arrival == Arrival::kSecond) {
      all_out.store(i, count, y);
    } else {
      all_out.each(i, count, [&](int j, T& at) {
        if (!order.is_first(piece.step(j), place.direction)) assign(at, y[j]);
      });
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
