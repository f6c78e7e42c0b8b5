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

// As Element, with the gradients of y and, but for the factor y, of z.
struct alignas(16) GradElement {
  float delta, value, g, by_z;
};

// Shared memory of one direction: what the steps of a segment need, all of it at once or, with many
// states, a tile at a time.
template <class Shape> struct BackwardMemory {
  static constexpr int kSteps = Shape::kSteps;
  static constexpr bool kWhole = Shape::kStates <= 16;
  static constexpr int kKept = kWhole ? kSegment : kSteps;     // steps
  static constexpr int kMatrix = kKept * Shape::kStates;
  static constexpr int kPitch = Shape::kChannels + 1;                // neighbours in different banks
  static constexpr int kElements = kKept * kPitch;                             // of a warp
  static constexpr int kStarts = kSegment / Shape::kHold * Shape::S * 32;
  // Neighbours in different banks.
  static constexpr int kSumsPitch = 2 * Shape::kStates + (Shape::S > 2 ? 16 : 8);
  static constexpr int kSums = kSteps * kSumsPitch, kTurns = kWhole ? 2 : 1;
  static constexpr int kOfElements = kSteps * Shape::kChannels;
  static constexpr int kWarp = 4 * kElements + kStarts + 3 * kOfElements;      // floats
  float *B, *C;              // (steps, states)
  GradElement* elements;     // of this warp: (steps, pitch)
  float* starts;             // of this warp: (holds, lanes, S)
  float *y, *by_value, *by_delta;     // of this warp: (steps of a tile, channels)
  float* sums;               // of all warps, in turns: (turns, warps, steps of a tile, pitch)

  __device__ BackwardMemory(const Place<Shape>& place, float4* memory) {
    const int warps = place.threads / 32;
    B = reinterpret_cast<float*>(memory) + place.direction * floats(warps);
    C = B + kMatrix;
    float* own = C + kMatrix + place.warp * kWarp;
    elements = reinterpret_cast<GradElement*>(own);
    starts = own + 4 * kElements;
    y = starts + kStarts, by_value = y + kOfElements, by_delta = by_value + kOfElements;
    sums = C + kMatrix + warps * kWarp;
  }
  __host__ __device__ static int floats(int64_t warps) {
    return 2 * kMatrix + int(warps) * (kWarp + kTurns * kSums);
  }
};

// Sum kCount values over the lanes of a warp that have different channels: those of a bit of the
// lane's number, then of the lower ones down to P. What is left in x[0 … kCount / kChannels) belongs
// to the values from the returned index on.
template <int P, int kMask, int kCount>
__device__ __forceinline__ int sum_rows(float* x, int lane) {
  if constexpr (kMask < P) {
    return 0;
  } else {
    constexpr int kHalf = kCount / 2;
    const bool upper = lane & kMask;
#pragma unroll
    for (int i = 0; i < kHalf; i++) {
      float keep = upper ? x[i + kHalf] : x[i], send = upper ? x[i] : x[i + kHalf];
      x[i] = keep + shuffle_xor(send, kMask);
    }
    return (upper ? kHalf : 0) + sum_rows<P, kMask / 2, kHalf>(x, lane);
  }
}

// Of a block, at most: what the registers suffice for.
template <class Shape>
constexpr int kBackwardThreads = Shape::kStates > 16 ? 128 : Shape::S > 2 ? 256 : 384;

template <class T, class Shape, bool kConstant>
__global__ void __launch_bounds__(kBackwardThreads<Shape>)
scan_backward(const __grid_constant__ Scan scan) {
  MMVIM_SHARED(memory);
  using Memory = BackwardMemory<Shape>;
  constexpr int S = Shape::S, kOwn = Shape::kOwn, kHold = Shape::kHold, kAhead = Shape::kAhead;
  constexpr int kSteps = Shape::kSteps, kTiles = kSegment / kSteps, kPitch = Memory::kPitch;
  Place<Shape> place(scan, scan.splits);
  const Direction& direction = scan.direction[place.direction];
  const bool gated = scan.z.data != nullptr, two = scan.directions == 2;
  const int states = int(scan.states), split = place.split;
  const int tiles = (place.length + kSteps - 1) / kSteps;
  const float scale = float(scan.scale);
  const Memory shared(place, memory);
  MatrixLoader<T, Shape, kConstant> matrix_B(direction.B, place, states),
      matrix_C(direction.C, place, states);
  Coefficients<T, Shape, kConstant> B(direction.B), C(direction.C);
  alignas(16) T raw_u[kOwn], raw_delta[kOwn], raw_g[kOwn], raw_z[kOwn];
  float A[S], X[S], h[S], grad_A[S], bias[kOwn], skip[kOwn];
  bool turn = false;
  float grad_B[S], grad_C[S];     // of constant ones

  auto fetch = [&](int i) {
    const int steps = place.steps(i);
    const Cells<Shape> cells(scan, place);
    const bool there = cells.step < steps;
    matrix_B.fetch(i, steps);
    matrix_C.fetch(i, steps);
    Stream<const T, Shape>(direction.u, cells, i).load(there, raw_u);
    Stream<const T, Shape>(direction.delta, cells, i).load(there, raw_delta);
    Stream<const T, Shape>(scan.grad_out, cells, i).load(there, raw_g);
    if (gated) Stream<const T, Shape>(scan.z, cells, i).load(there, raw_z);
  };
  auto place_of = [](int k) { return Memory::kWhole ? k * kSteps : 0; };   // of tile k of a segment
  const GradElement* of_channel = shared.elements + place.row;
  // This lane's cells of tile k.
  auto cells_of = [&](const Cells<Shape>& cells, int k) {
    return shared.elements + (place_of(k) + cells.step % kSteps) * kPitch + cells.column;
  };
  auto start = [&](int step_of_segment) {
    return shared.starts + (step_of_segment / kHold * 32 + place.lane) * S;
  };
  float* sums_of_tile = shared.sums;
  // The gradient of B_t (0) or C_t (1) of kHold steps over the channels of a warp.
  auto write_matrix_sums = [&](int from, int which, float (&values)[kHold * S]) {
    constexpr int kLeft = kHold * S / Shape::kChannels, kRun = kLeft < S ? kLeft : S;
    const int index = sum_rows<Shape::P, 16, kHold * S>(values, place.lane);
    float* to = sums_of_tile + place.warp * Memory::kSums + (from + index / S) * Memory::kSumsPitch
        + which * Shape::kStates + place.part * S + index % S;
#pragma unroll
    for (int i = 0; i < kLeft; i += kRun)
      copy_words<kRun>(to + i / S * Memory::kSumsPitch, values + i);
  };

  // What has been fetched, as tile k of the segment.
  auto store = [&](int k, int i) {
    const int steps = place.steps(i);
    if (!Memory::kWhole) __syncthreads();     // everybody has read the last tile
    matrix_B.store(i, steps, shared.B + place_of(k) * Shape::kStates);
    matrix_C.store(i, steps, shared.C + place_of(k) * Shape::kStates);
    const Cells<Shape> cells(scan, place);
    alignas(16) GradElement own[kOwn];
#pragma unroll
    for (int j = 0; j < kOwn; j++) {
      float delta = step_size(to_float(raw_delta[j]) + bias[j], scan.softplus);
      delta = cells.step < steps ? delta : 0.f;
      float g = to_float(raw_g[j]) * scale, by_z = 0;     // zero where there is no such channel
      if (gated) {
        const float z = to_float(raw_z[j]), s = sigmoid(z);
        by_z = g * s * fmaf(z, 1 - s, 1.f), g *= z * s;
      }
      own[j] = {delta, delta * to_float(raw_u[j]), g, by_z};
    }
    if (cells.has_cells()) copy_words<kOwn>(cells_of(cells, k), own);
    __syncthreads();
  };
  // The states of tile k of the segment again, from h on.
  auto record = [&](int k) {
    Transition<Shape> current, next;
    current.template prepare<kPitch>(B, shared.B, of_channel, place_of(k), place.part, A);
#pragma unroll
    for (int from = 0; from < kSteps; from += kAhead) {
      if (from + kAhead < kSteps)
        next.template prepare<kPitch>(B, shared.B, of_channel, place_of(k) + from + kAhead,
                                      place.part, A);
      if (from % kHold == 0) copy_words<S>(start(k * kSteps + from), h);
#pragma unroll
      for (int t = 0; t < kAhead; t++)
#pragma unroll
        for (int s = 0; s < S; s++) h[s] = fmaf(current.decay[t][s], h[s], current.input[t][s]);
      current = next;
    }
  };
  // kHold steps from `from` on of a tile: there with the states, back with the adjoint. What belongs
  // to elements goes to shared memory.
  auto retreat = [&](int tile, int from) {
    const int first = place_of(tile) + from;
    float before[kHold][S], decay[kHold][S], products[kHold * S], sums[kQuad], others[kQuad];
    alignas(16) float at[S];
    copy_words<S>(at, start(tile * kSteps + from));
#pragma unroll
    for (int k = 0; k < kHold; k++) {
      const float delta = of_channel[(first + k) * kPitch].delta;
#pragma unroll
      for (int s = 0; s < S; s++) decay[k][s] = exp2(delta * A[s]);
    }
#pragma unroll
    for (int k = 0; k < kHold; k++) {
      const GradElement element = of_channel[(first + k) * kPitch];
      alignas(16) float b[S], c[S];
      B.at(shared.B, first + k, place.part, b);
      C.at(shared.C, first + k, place.part, c);
      sums[k % kQuad] = 0;
#pragma unroll
      for (int s = 0; s < S; s++) {
        before[k][s] = at[s];
        at[s] = fmaf(decay[k][s], at[s], element.value * b[s]);
        sums[k % kQuad] = fmaf(at[s], c[s], sums[k % kQuad]);
        products[k * S + s] = at[s] * element.g;
        if constexpr (kConstant) grad_C[s] = fmaf(at[s], element.g, grad_C[s]);
      }
      if (k % kQuad == kQuad - 1 && gated)
        write_sums(sums, place, from + k + 1 - kQuad, shared.y);
    }
    if (!kConstant || direction.C.varying) write_matrix_sums(from, 1, products);
#pragma unroll
    for (int k = kHold - 1; k >= 0; k--) {
      const GradElement element = of_channel[(first + k) * kPitch];
      alignas(16) float b[S], c[S];
      B.at(shared.B, first + k, place.part, b);
      C.at(shared.C, first + k, place.part, c);
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
        write_sums(sums, place, from + k, shared.by_value);
        write_sums(others, place, from + k, shared.by_delta);
      }
    }
    if (!kConstant || direction.B.varying) write_matrix_sums(from, 0, products);
  };
  // Sums over the channels of the block for B and C of tile i; the next block of channels adds to
  // them. A thread has four states of B or C.
  auto write_matrices = [&](int i, bool add) {
    constexpr int kFour = 4, kPieces = Shape::kStates / kFour;
    const int64_t row = (place.batch * scan.groups + place.group) * scan.splits + split;
    const int warps = place.threads / 32, steps = place.steps(i);
    for (int k = place.thread; k < steps * 2 * kPieces; k += place.threads) {
      const int t = k / (2 * kPieces), which = k / kPieces % 2, n = k % kPieces * kFour;
      if (kConstant && !(which == 0 ? direction.B : direction.C).varying) continue;
      const float* from = sums_of_tile + t * Memory::kSumsPitch + which * Shape::kStates + n;
      alignas(16) float sum[kFour], more[kFour];
      copy_words<kFour>(sum, from);
      for (int w = 1; w < warps; w++) {
        copy_words<kFour>(more, from + w * Memory::kSums);
#pragma unroll
        for (int e = 0; e < kFour; e++) sum[e] += more[e];
      }
      float* to = (which == 0 ? direction.grad_B : direction.grad_C)
          + (row * scan.length + place.time(i * kSteps + t)) * states + n;
      if (states == Shape::kStates && !add) {
        copy_words<kFour>(to, sum);
        continue;
      }
#pragma unroll
      for (int e = 0; e < kFour; e++)
        if (n + e < states) to[e] = add ? to[e] + sum[e] : sum[e];
    }
  };

  const int blocks = int(blocks_per_group(scan, place.width));
  for (int block = split; block < blocks; block += int(scan.splits)) {
    place.choose(scan, block);
    const Cells<Shape> cells(scan, place);
    cells.load(direction.delta_bias, bias);
    cells.load(direction.D, skip);
    float sum_D[kOwn] = {}, sum_bias[kOwn] = {};
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

    fetch((tiles - 1) / kTiles * kTiles);
    for (int base = (tiles - 1) / kTiles * kTiles; base >= 0; base -= kTiles) {
      const int count = tiles - base < kTiles ? tiles - base : kTiles;
      const int64_t segments = (scan.length + kSegment - 1) / kSegment;
      const int64_t segment = (place.chunk * scan.chunk_length + base * kSteps) / kSegment;
      load_states(scan, place, direction.checkpoints, place.batch * segments + segment, h);
      for (int k = 0; k < count; k++) {
        const int i = base + k;
        store(k, i);
        if (k + 1 < count) fetch(i + 1);
        record(k);
      }
      for (int k = count - 1; k >= 0; k--) {
        const int i = base + k, steps = place.steps(i);
        if (!Memory::kWhole && k + 1 < count) fetch(i), store(k, i);
        // While these are written, other warps may still read the last tile's; where tiles are stored
        // one by one, a barrier is in between.
        sums_of_tile = shared.sums + (turn ? place.threads / 32 * Memory::kSums : 0);
        const bool there = cells.step < steps;
        alignas(16) T u_again[kOwn], delta_again[kOwn];
        Stream<const T, Shape>(direction.u, cells, i).load(there, u_again);
        Stream<const T, Shape>(direction.delta, cells, i).load(there, delta_again);
        if (k == 0 && base > 0) fetch(base - kTiles);
#pragma unroll
        for (int from = kSteps - kHold; from >= 0; from -= kHold) retreat(k, from);
        __syncwarp();     // for what has been summed; a barrier follows before the next tile's sums
        alignas(16) float y[kOwn], by_value[kOwn], by_delta[kOwn];
        alignas(16) GradElement own[kOwn];
        const int at = cells.step % kSteps * Shape::kChannels + cells.column;
        copy_words<kOwn>(own, cells_of(cells, k));
        copy_words<kOwn>(y, shared.y + at);
        copy_words<kOwn>(by_value, shared.by_value + at);
        copy_words<kOwn>(by_delta, shared.by_delta + at);

        const ArrivalOrder<kSteps> order(place.length, i, true);
        const Arrival arrival = two ? order.all(steps) : Arrival::kSecond;
        alignas(16) float grad_u[kOwn];
#pragma unroll
        for (int j = 0; j < kOwn; j++) {
          const float u = to_float(u_again[j]);
          const float slope = sigmoid(to_float(delta_again[j]) + bias[j]);
          by_delta[j] = fmaf(by_value[j], u, by_delta[j] * kLn2) * (scan.softplus ? slope : 1.f);
          by_delta[j] = there ? by_delta[j] : 0.f;
          grad_u[j] = fmaf(by_value[j], own[j].delta, skip[j] * own[j].g);
          sum_bias[j] += by_delta[j];
          sum_D[j] = there ? fmaf(own[j].g, u, sum_D[j]) : sum_D[j];
          if (direction.D != nullptr) y[j] = fmaf(skip[j], u, y[j]);
        }
        Stream<T, Shape>(direction.grad_delta, cells, i).store(there, by_delta);
        Stream<T, Shape>(direction.grad_u, cells, i).store(there, grad_u);
        const bool comes_first = order.is_first(cells.step, place.direction);
        if (gated && arrival != Arrival::kSecond)
          Stream<float, Shape>(scan.partial, cells, i).store(there && comes_first, y);
        __syncthreads();     // the sums of all warps and the y of both directions are there
        if (gated && arrival != Arrival::kFirst) {
          alignas(16) float other[kOwn];
          if (two) Stream<float, Shape>(scan.partial, cells, i).load(there, other);
#pragma unroll
          for (int j = 0; j < kOwn; j++) y[j] = (two ? y[j] + other[j] : y[j]) * own[j].by_z;
          Stream<T, Shape>(scan.grad_z, cells, i).store(there && !(two && comes_first), y);
        }
        write_matrices(i, block > split);
        turn = Memory::kTurns == 2 && !turn;
      }
    }
    store_states(scan, place, direction.grad_A, place.line, grad_A);
    if constexpr (kConstant) {
      if (!direction.B.varying) store_states(scan, place, direction.grad_B, place.line, grad_B);
      if (!direction.C.varying) store_states(scan, place, direction.grad_C, place.line, grad_C);
    }
    sum_steps<Shape>(sum_D);
    sum_steps<Shape>(sum_bias);
#pragma unroll
    for (int j = 0; j < kOwn; j++)
      if (cells.step == 0 && j < cells.left) {
        const int64_t at = place.line * scan.channels + cells.channel + j;
        if (direction.grad_D != nullptr) direction.grad_D[at] = sum_D[j];
        if (direction.grad_delta_bias != nullptr) direction.grad_delta_bias[at] = sum_bias[j];
      }
  }
}

}  // namespace mmvim
