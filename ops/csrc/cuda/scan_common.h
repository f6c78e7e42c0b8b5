// How a block is laid out, and where its states and matrices are.
//
// A block owns `width` neighbouring channels of one group in one chunk of one batch element, for
// one direction or, with half of its warps each, for two. P lanes share a channel, with S states
// each. What depends on an element (a channel at a step) alone, such as softplus and gate, is
// computed once, by the lane of the warp that owns it (cells.h): it reads the element from memory,
// leaves for the others what the recurrence needs, gets their sums and writes the results, both
// through shared memory. So warps share nothing but the tiles of B and C. Time is counted in the
// order of the scan.
#pragma once
#include "args.h"
#include "device.h"

namespace mmvim {

constexpr int kQuad = 4;        // steps whose sums over states are taken together

// Lanes per channel, states per lane, steps of a tile.
template <int P_, int S_, int kSteps_> struct Shape {
  static constexpr int P = P_, S = S_, kSteps = kSteps_;
  static constexpr int kStates = P * S;
  static constexpr int kChannels = 32 / P;             // of a warp
  static constexpr int kOwn = P < kSteps ? kSteps / P : 1;    // cells of a tile that a lane has
  static constexpr int kHold = S > 2 ? 4 : 8;          // steps whose states backward holds at once
  static constexpr int kAhead = S > 4 ? 2 : kQuad;     // steps that are prepared ahead
};

__host__ __device__ inline int64_t blocks_per_group(const Scan& scan, int64_t width) {
  return (scan.channels / scan.groups + width - 1) / width;
}

// A place in the grid and in the block.
template <class Shape> struct Place {
  static constexpr int kSteps = Shape::kSteps;
  int direction, thread, threads, warp, lane, part, row;   // thread: within the direction
  int width;                     // channels of the block
  int batch, group, chunk, line;    // line: batch * chunks + chunk; in the grid, so below 2^31
  int split;
  int member;                    // first channel of the block, within its group
  int channel;                   // of this lane
  bool exists;                   // else the lane reads the last one's, and writes nothing
  int64_t begin;                 // time of the first step of the scan
  int step;                      // +1 or -1
  int length;                    // of the chunk

  __device__ Place(const Scan& scan, int64_t blocks) {
    threads = int(scan.warps) * 32;
    direction = int(threadIdx.x) / threads;
    thread = int(threadIdx.x) % threads;
    warp = thread / 32, lane = thread % 32, part = lane % Shape::P, row = lane / Shape::P;
    width = int(scan.warps) * Shape::kChannels;
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
    int of_group = member + warp * Shape::kChannels + row;
    exists = of_group < per_group;
    channel = group * per_group + (exists ? of_group : per_group - 1);
  }

  __device__ int64_t time(int step_of_chunk) const { return begin + step * step_of_chunk; }

  // The steps of tile i.
  __device__ int steps(int i) const {
    int left = length - i * kSteps;
    return left < kSteps ? left : kSteps;
  }
};

// B or C as the recurrence reads it: S values of a step for this lane.
template <class T, class Shape, bool kConstant> struct Coefficients {
  bool varying;
  float fixed[Shape::S];

  __device__ __forceinline__ explicit Coefficients(const Matrix& m)
      : varying(!kConstant || m.varying) {}
  __device__ __forceinline__ void choose(const Matrix& m, const Place<Shape>& place, int states) {
    if constexpr (kConstant) {
      if (varying) return;
#pragma unroll
      for (int s = 0; s < Shape::S; s++) {
        int n = place.part * Shape::S + s;
        fixed[s] = place.exists && n < states
            ? to_float(static_cast<const T*>(m.data)[place.channel * m.channel + n * m.state])
            : 0.f;
      }
    }
  }
  __device__ __forceinline__ void at(const float* tile, int t, int part,
                                     float (&values)[Shape::S]) const {
    if (!kConstant || varying) {
      constexpr int kWord = Shape::S % 4 == 0 ? 4 : Shape::S;
#pragma unroll
      for (int s = 0; s < Shape::S; s += kWord)
        copy_words<kWord>(values + s, tile + t * Shape::kStates + part * Shape::S + s);
    } else {
#pragma unroll
      for (int s = 0; s < Shape::S; s++) values[s] = fixed[s];
    }
  }
};

// f(s, state) for the states of this lane that exist.
template <class Shape, class F>
__device__ __forceinline__ void each_state(const Place<Shape>& place, int states, F f) {
#pragma unroll
  for (int s = 0; s < Shape::S; s++) {
    int n = place.part * Shape::S + s;
    if (place.exists && n < states) f(s, int64_t(n));
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
                                       float (&A)[Shape::S]) {
  const float* from = scan.direction[place.direction].A;
#pragma unroll
  for (int s = 0; s < Shape::S; s++) A[s] = 0;
  each_state(place, int(scan.states), [&](int s, int64_t n) {
    A[s] = scaled_A(from[place.channel * scan.states + n]);
  });
}

// Into and out of (lines, states, channels).
template <class Shape>
__device__ __forceinline__ void load_states(const Scan& scan, const Place<Shape>& place,
                                            const float* from, int64_t line,
                                            float (&h)[Shape::S]) {
#pragma unroll
  for (int s = 0; s < Shape::S; s++) h[s] = 0;
  if (from == nullptr) return;
  each_state(place, int(scan.states), [&](int s, int64_t n) {
    h[s] = from[(line * scan.states + n) * scan.channels + place.channel];
  });
}
template <class Shape>
__device__ __forceinline__ void store_states(const Scan& scan, const Place<Shape>& place,
                                             float* to, int64_t line,
                                             const float (&h)[Shape::S]) {
  each_state(place, int(scan.states), [&](int s, int64_t n) {
    to[(line * scan.states + n) * scan.channels + place.channel] = h[s];
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
__device__ __forceinline__ float sum_parts(const float (&x)[kQuad], int part) {
  static_assert(kQuad == 4 && Shape::P >= 4, "");
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

template <int kSteps> struct ArrivalOrder {
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

}  // namespace mmvim
