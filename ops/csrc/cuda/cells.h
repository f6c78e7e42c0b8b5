// Elements of sequences on their way between memory and a block. A lane has `kOwn` neighbouring
// channels of one step of a tile of its warp: where channels lie next to each other in memory, it
// moves them in words of up to 16 bytes, and it is within the sequence or not as a whole.
#pragma once
#include "scan_common.h"

namespace mmvim {

// Which elements of a tile a lane has.
template <class Shape> struct Cells {
  static constexpr int kOwn = Shape::kOwn, kPerStep = Shape::kChannels / kOwn;    // lanes of a step
  static constexpr int kPitch = Shape::kChannels + 2;   // of the steps of a tile of Elements
  static constexpr bool kAll = kPerStep * Shape::kSteps == 32;     // no lane is left over

  const Place<Shape>& place;
  int step, column;      // column: of the first channel, within the warp
  int channel, left;     // of the first one; so many of the group from there on, none if negative

  __device__ __forceinline__ Cells(const Scan& scan, const Place<Shape>& place)
      : place(place) {
    step = place.lane / kPerStep, column = place.lane % kPerStep * kOwn;
    const int per_group = int(scan.channels / scan.groups);
    const int of_group = place.member + place.warp * Shape::kChannels + column;
    left = per_group - of_group;
    channel = place.group * per_group + of_group;
  }
  __device__ __forceinline__ bool has_cells() const { return kAll || step < Shape::kSteps; }

  // Of a vector of the arguments, these channels; zero where it is missing.
  __device__ __forceinline__ void load(const float* from, float (&to)[kOwn]) const {
#pragma unroll
    for (int j = 0; j < kOwn; j++)
      to[j] = from != nullptr && j < left ? from[channel + j] : 0.f;
  }
};

// The cells of a sequence, of one tile after another.
template <class T, class Shape> struct Stream {
  using Value = std::remove_const_t<T>;
  static constexpr int kOwn = Shape::kOwn;
  static constexpr int kWord = sizeof(T) * kOwn < 16 ? sizeof(T) * kOwn : 16;    // bytes

  T* at;                      // the first cell in the current tile
  int64_t apart, channel;     // between tiles, between channels
  // Not cut to 0 … kOwn: nvcc 13.0 makes one instruction of that on sm_90 (VIMNMX.RELU), both of whose
  // predicates went to one register, and an H100 then wrote channels that are not there.
  int left;
  bool in_words;

  __device__ __forceinline__ Stream(const Sequence& x, const Cells<Shape>& cells, int tile = 0)
      : apart(Shape::kSteps * cells.place.step * x.time), channel(x.channel), left(cells.left) {
    const Place<Shape>& place = cells.place;
    at = static_cast<T*>(x.data) + place.batch * x.batch + cells.channel * x.channel
        + place.time(tile * Shape::kSteps + cells.step) * x.time;
    in_words = kOwn > 1 && channel == 1 && left >= kOwn
        && reinterpret_cast<uintptr_t>(at) % kWord == 0 && apart * int(sizeof(T)) % kWord == 0;
  }
  __device__ __forceinline__ void move(int tiles) { at += tiles * apart; }

  // Zero where there is none.
  __device__ __forceinline__ void load(bool there, Value (&to)[kOwn]) const {
    if (there && in_words) return copy_words<kOwn>(to, at);
#pragma unroll
    for (int j = 0; j < kOwn; j++) {
      assign(to[j], 0.f);
      if (there && j < left) to[j] = at[j * channel];
    }
  }
  __device__ __forceinline__ void store(bool there, const float (&from)[kOwn]) const {
    if (!there) return;
    alignas(16) Value values[kOwn];
#pragma unroll
    for (int j = 0; j < kOwn; j++) assign(values[j], from[j]);
    if (in_words) return store_words<kOwn>(at, values);
#pragma unroll
    for (int j = 0; j < kOwn; j++)
      if (j < left) at[j * channel] = values[j];
  }
};

// Sums over states of four steps from `from` on of a tile, to (steps, channels) in shared memory.
template <class Shape>
__device__ __forceinline__ void write_sums(const float (&x)[kQuad], const Place<Shape>& place,
                                           int from, float* tile) {
  tile += from * Shape::kChannels + place.row;
  if constexpr (Shape::P == 2) {
#pragma unroll
    for (int k = 0; k < kQuad; k += 2) {
      const float keep = place.part ? x[k + 1] : x[k], send = place.part ? x[k] : x[k + 1];
      tile[(k + place.part) * Shape::kChannels] = keep + shuffle_xor(send, 1);
    }
  } else {
    const float sum = sum_parts<Shape>(x, place.part);
    if (place.part < kQuad) tile[place.part * Shape::kChannels] = sum;
  }
}

// Sums over the lanes with the same channels.
template <class Shape>
__device__ __forceinline__ void sum_steps(float (&x)[Shape::kOwn]) {
#pragma unroll
  for (int mask = Cells<Shape>::kPerStep; mask < 32; mask *= 2)
#pragma unroll
    for (int j = 0; j < Shape::kOwn; j++) x[j] += shuffle_xor(x[j], mask);
}

}  // namespace mmvim
