// How a block is laid out, and where its states and matrices are.
//
// A block owns `width` neighbouring channels of one group in one chunk of one batch element, for
// one direction or, with half of its warps each, for two. A warp's lanes are cut as Shape says: P
// lanes share a channel, S states each, and every lane has R channels, so that a value of B or C
// that was read from shared memory serves R times. Sequences are read once per element, by all
// threads, along whichever of channel and time is next to each other in memory; what depends on an
// element alone (softplus, gate) is computed there, once. Time is counted in the order of the scan.
#pragma once
#include "args.h"
#include "device.h"

namespace mmvim {

template <int P_, int S_, int R_> struct Shape {
  static constexpr int P = P_, S = S_, R = R_;
  static constexpr int kStates = P * S;
  static constexpr int kRows = 32 / P;                 // lanes with different channels
  static constexpr int kChannels = kRows * R;          // of a warp
  static constexpr int kPitch = kStates + 4;           // of a step of B or C, 16-byte aligned
  static constexpr int kElements = (kSteps * kChannels + 31) / 32;   // of a tile, per thread
  static constexpr int kKept = S > kRows ? S / kRows : 1;     // states of a lane after sum_rows
};

// Steps of a tile begin in different banks of shared memory, and at multiples of 16 bytes.
constexpr int kPadding = 4;

__host__ __device__ inline int64_t blocks_per_group(const Scan& scan, int64_t width) {
  return (scan.channels / scan.groups + width - 1) / width;
}

// A place in the grid and in the block.
template <class Shape> struct Place {
  int direction, thread, threads, warp, lane, part, row;   // thread: within the direction
  int width, pitch;              // channels of the block, and of a step of a tile in shared memory
  int batch, group, chunk, line;    // line: batch * chunks + chunk; in the grid, so below 2^31
  int split;
  int member, first_channel;     // of the block, within its group and of all
  int channels;                  // that exist
  int64_t begin;                 // time of the first step of the scan
  int step;                      // +1 or -1
  int length;                    // of the chunk

  __device__ Place(const Scan& scan, int64_t blocks) {
    threads = int(scan.warps) * 32;
    direction = int(threadIdx.x) / threads;
    thread = int(threadIdx.x) % threads;
    warp = thread / 32, lane = thread % 32, part = lane % Shape::P, row = lane / Shape::P;
    width = int(scan.warps) * Shape::kChannels;
    pitch = width + kPadding;
    unsigned i = blockIdx.x;
    split = int(i % unsigned(blocks)), i /= unsigned(blocks);
    group = int(i % unsigned(scan.groups)), i /= unsigned(scan.groups);
    chunk = int(i % unsigned(scan.chunks)), batch = int(i / unsigned(scan.chunks));
    line = batch * int(scan.chunks) + chunk;
    int64_t from = chunk * scan.chunk_length;
    length = int(scan.length - from < scan.chunk_length ? scan.length - from : scan.chunk_length);
    bool reverse = scan.direction[direction].reverse;
    begin = reverse ? from + length - 1 : from;
    step = reverse ? -1 : 1;
    choose(scan, split);
  }

  __device__ void choose(const Scan& scan, int block) {
    int per_group = int(scan.channels / scan.groups);
    member = block * width;
    first_channel = group * per_group + member;
    channels = per_group - member < width ? per_group - member : width;
  }

  __device__ int channel(int r) const {
    return warp * Shape::kChannels + r * Shape::kRows + row;
  }
  __device__ int64_t time(int step_of_chunk) const { return begin + step * step_of_chunk; }
};

// B or C as the recurrence reads it: S values of a step for this lane.
template <class T, class Shape, bool kConstant> struct Coefficients {
  const float* tile;
  bool varying;
  float fixed[kConstant ? Shape::R : 1][Shape::S];

  __device__ __forceinline__ Coefficients(const Matrix& m, const float* tile) : tile(tile) {
    varying = !kConstant || m.varying;
  }
  __device__ __forceinline__ void choose(const Matrix& m, const Place<Shape>& place, int states) {
    if constexpr (kConstant) {
      if (varying) return;
#pragma unroll
      for (int r = 0; r < Shape::R; r++)
#pragma unroll
        for (int s = 0; s < Shape::S; s++) {
          int c = place.channel(r), n = place.part * Shape::S + s;
          bool exists = c < place.channels && n < states;
          int64_t at = (place.first_channel + c) * m.channel + n * m.state;
          fixed[r][s] = exists ? to_float(static_cast<const T*>(m.data)[at]) : 0.f;
        }
    }
  }
  __device__ __forceinline__ void at(int t, int r, int part, float (&values)[Shape::S]) const {
    if (!kConstant || varying) {
#pragma unroll
      for (int s = 0; s < Shape::S; s += 4) {
        float4 v = *reinterpret_cast<const float4*>(tile + t * Shape::kPitch + part * Shape::S + s);
        values[s] = v.x, values[s + 1] = v.y, values[s + 2] = v.z, values[s + 3] = v.w;
      }
    } else {
#pragma unroll
      for (int s = 0; s < Shape::S; s++) values[s] = fixed[kConstant ? r : 0][s];
    }
  }
};

// f(r, s, channel, state) for the pairs of this lane that exist.
template <class Shape, class F>
__device__ __forceinline__ void each_state(const Place<Shape>& place, int states, F f) {
#pragma unroll
  for (int r = 0; r < Shape::R; r++)
#pragma unroll
    for (int s = 0; s < Shape::S; s++) {
      int c = place.channel(r), n = place.part * Shape::S + s;
      if (c < place.channels && n < states) f(r, s, place.first_channel + c, int64_t(n));
    }
}

// A · log2 e; finite, as a tile is filled up with steps of Δ = 0, which must not touch the states.
__device__ __forceinline__ float scaled_A(float A) {
  A *= kLog2e;
  return A < -kLargest ? -kLargest : A > kLargest ? kLargest : A;
}

// The same of a lane's states, zero where there is no such channel or state.
template <class Shape>
__device__ __forceinline__ void load_A(const Scan& scan, const Place<Shape>& place,
                                       float (&A)[Shape::R][Shape::S]) {
  const float* from = scan.direction[place.direction].A;
#pragma unroll
  for (int r = 0; r < Shape::R; r++)
#pragma unroll
    for (int s = 0; s < Shape::S; s++) A[r][s] = 0;
  each_state(place, int(scan.states), [&](int r, int s, int64_t c, int64_t n) {
    A[r][s] = scaled_A(from[c * scan.states + n]);
  });
}

// Into and out of (lines, states, channels).
template <class Shape>
__device__ __forceinline__ void load_states(const Scan& scan, const Place<Shape>& place,
                                            const float* from, int64_t line,
                                            float (&h)[Shape::R][Shape::S]) {
#pragma unroll
  for (int r = 0; r < Shape::R; r++)
#pragma unroll
    for (int s = 0; s < Shape::S; s++) h[r][s] = 0;
  if (from == nullptr) return;
  each_state(place, int(scan.states), [&](int r, int s, int64_t c, int64_t n) {
    h[r][s] = from[(line * scan.states + n) * scan.channels + c];
  });
}
template <class Shape>
__device__ __forceinline__ void store_states(const Scan& scan, const Place<Shape>& place,
                                             float* to, int64_t line,
                                             const float (&h)[Shape::R][Shape::S]) {
  each_state(place, int(scan.states), [&](int r, int s, int64_t c, int64_t n) {
    to[(line * scan.states + n) * scan.channels + c] = h[r][s];
  });
}

// Where the chunks of this direction begin, or null for zero.
template <class Shape>
__device__ __forceinline__ float* ends_of(const Scan& scan, const Place<Shape>& place) {
  if (scan.chunks == 1) return nullptr;
  return scan.ends
      + place.direction * scan.batch * scan.chunks * scan.states * scan.channels;
}

// Sum over the P lanes of a channel of the values of four steps; returns that of step part % 4.
template <class Shape>
__device__ __forceinline__ float sum_parts(const float (&x)[kStride], int part) {
  static_assert(kStride == 4 && Shape::P >= 4, "");
  bool second = part & 2, odd = part & 1;
  float a = second ? x[2] : x[0], b = second ? x[3] : x[1];
  a += shuffle_xor(second ? x[0] : x[2], 2);
  b += shuffle_xor(second ? x[1] : x[3], 2);
  float sum = odd ? b : a;
  sum += shuffle_xor(odd ? a : b, 1);
#pragma unroll
  for (int mask = 4; mask < Shape::P; mask *= 2) sum += shuffle_xor(sum, mask);
  return sum;
}

// Which of two directions comes to an element of the sequence first? The one that comes second finds
// the other's part of the sum and finishes. A tile may have both kinds, and elements that both come
// to at the same time; then direction 1 counts as second, after a barrier. Both directions have the
// same answer for tiles of the same number, as each counts from its own end.
enum class Arrival { kFirst, kSecond, kMixed };

struct ArrivalOrder {
  int tile, last;      // of the scan; the position of its first step from the scan's other end
  bool backward;       // the pass goes from the last tile to the first

  __device__ __forceinline__ ArrivalOrder(int length, int tile, bool backward)
      : tile(tile), last(length - 1 - tile * kSteps), backward(backward) {}

  __device__ __forceinline__ Arrival compare(int other) const {
    if (other == tile) return Arrival::kMixed;
    return (other > tile) != backward ? Arrival::kFirst : Arrival::kSecond;
  }
  __device__ __forceinline__ Arrival all(int steps) const {
    Arrival from = compare(last / kSteps), to = compare((last + 1 - steps) / kSteps);
    return from == to ? from : Arrival::kMixed;
  }
  __device__ __forceinline__ bool is_first(int t, int direction) const {
    Arrival arrival = compare((last - t) / kSteps);
    return arrival == Arrival::kFirst || (arrival == Arrival::kMixed && direction == 0);
  }
};

// Shared memory in floats.
template <class Shape> struct Layout {
  int sequence, matrix;   // of one tile
  __host__ __device__ Layout(int64_t warps)
      : sequence(kSteps * (int(warps) * Shape::kChannels + kPadding)),
        matrix(kSteps * Shape::kPitch) {}
};

}  // namespace mmvim
