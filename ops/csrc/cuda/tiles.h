// How tiles come from memory into shared memory, and back: in pieces of neighbours, in words of up to
// 16 bytes wherever they lie in a row that begins at a multiple of that, else one by one.
#pragma once
#include <type_traits>

#include "scan_common.h"

namespace mmvim {

__device__ __forceinline__ int64_t magnitude(int64_t x) { return x < 0 ? -x : x; }

// How many of N elements from the given one on exist, along a line that exists itself or does not.
__device__ __forceinline__ int existing(bool line, int left, int N) {
  return !line || left < 0 ? 0 : left < N ? left : N;
}

template <int N, class T> __device__ __forceinline__ void copy_words(T* to, const T* from) {
  using Words = typename WordsOf<sizeof(T) * N>::type;
#pragma unroll
  for (int i = 0; i < int(sizeof(T) * N / sizeof(Words)); i++)
    reinterpret_cast<Words*>(to)[i] = reinterpret_cast<const Words*>(from)[i];
}

// N neighbours of every tile of a sequence or matrix, for one thread.
template <class T, int N> struct Neighbours {
  using Value = std::remove_const_t<T>;
  T* first;                // of the first tile
  int64_t apart, tiles_apart;
  bool in_words;

  __device__ __forceinline__ Neighbours(T* first, int64_t apart, int64_t tiles_apart)
      : first(first), apart(apart), tiles_apart(tiles_apart) {
    constexpr int kBytes = sizeof(typename WordsOf<sizeof(T) * N>::type);
    in_words = apart == 1 && reinterpret_cast<uintptr_t>(first) % kBytes == 0
        && tiles_apart * int64_t(sizeof(T)) % kBytes == 0;
  }
  __device__ __forceinline__ T* of(int tile) const { return first + tile * tiles_apart; }

  // Those that exist; zeros for the others.
  __device__ __forceinline__ void load(int tile, int count, Value (&to)[N]) const {
    const T* from = of(tile);
    if (in_words && count == N) return copy_words<N>(to, from);
#pragma unroll
    for (int i = 0; i < N; i++) {
      assign(to[i], 0.f);
      if (i < count) to[i] = from[i * apart];
    }
  }
  // f(i, element) for those that exist.
  template <class F> __device__ __forceinline__ void each(int tile, int count, F f) const {
#pragma unroll
    for (int i = 0; i < N; i++)
      if (i < count) f(i, of(tile)[i * apart]);
  }
  __device__ __forceinline__ void store(int tile, int count, const float (&from)[N]) const {
    alignas(16) T rounded[N];
#pragma unroll
    for (int i = 0; i < N; i++) assign(rounded[i], from[i]);
    T* to = of(tile);
    if (in_words && count == N) return copy_words<N>(to, rounded);
#pragma unroll
    for (int i = 0; i < N; i++)
      if (i < count) to[i * apart] = rounded[i];
  }
};

// What a thread brings and takes of every tile of a sequence: kCount neighbours along channels or
// along time, whichever are next to each other in memory.
template <class Shape> struct Piece {
  static constexpr int kCount = Shape::kElements;
  const Place<Shape>& place;
  bool along_channels;
  int time, channel;     // of the first, in the tile
  int at;                // its place in shared memory

  __device__ Piece(const Place<Shape>& place, const Sequence& like)
      : place(place), along_channels(magnitude(like.channel) <= magnitude(like.time)) {
    int per_line = (along_channels ? place.width : kSteps) / kCount;
    int line = place.thread / per_line, first = place.thread % per_line * kCount;
    if (line >= (along_channels ? kSteps : place.width)) line = 0, first = kIdle;
    time = along_channels ? line : first, channel = along_channels ? first : line;
    at = time * place.pitch + channel;
  }

  // How many there are in a tile of so many steps.
  __device__ __forceinline__ int count(int steps) const {
    return along_channels ? existing(time < steps, place.channels - channel, kCount)
                          : existing(channel < place.channels, steps - time, kCount);
  }
  __device__ __forceinline__ int step(int i) const { return along_channels ? time : time + i; }

  template <class T> __device__ __forceinline__ Neighbours<T, kCount> of(const Sequence& x) const {
    T* first = static_cast<T*>(x.data) + place.batch * x.batch
        + int64_t(place.first_channel + channel) * x.channel + place.time(time) * x.time;
    return {first, along_channels ? x.channel : place.step * x.time, kSteps * place.step * x.time};
  }

  // Into a tile in shared memory, those that do not exist, too; and back.
  __device__ __forceinline__ void put(float* tile, const float (&values)[kCount]) const {
    if (idle()) return;
    if (kCount % 4 == 0 && along_channels)
      return copy_words<kCount>(tile + at, values);
#pragma unroll
    for (int i = 0; i < kCount; i++) tile[at + i * apart()] = values[i];
  }
  __device__ __forceinline__ void get(const float* tile, float (&values)[kCount]) const {
    if (idle()) return;
    if (kCount % 4 == 0 && along_channels)
      return copy_words<kCount>(values, tile + at);
#pragma unroll
    for (int i = 0; i < kCount; i++) values[i] = tile[at + i * apart()];
  }
  // Of a vector in shared memory that has a value per channel.
  __device__ __forceinline__ void get_channels(const float* from, float (&values)[kCount]) const {
    if (idle()) return;
    if (kCount % 4 == 0 && along_channels)
      return copy_words<kCount>(values, from + channel);
#pragma unroll
    for (int i = 0; i < kCount; i++) values[i] = from[along_channels ? channel + i : channel];
  }

private:
  __device__ __forceinline__ int apart() const { return along_channels ? 1 : place.pitch; }
  // With more than 16 states there may be more threads than pieces.
  static constexpr int kIdle = 1 << 16;
  __device__ __forceinline__ bool idle() const {
    return Shape::kChannels * kSteps % 32 != 0 && (time >= kIdle || channel >= kIdle);
  }
};

// A tile of B or C on its way through registers into shared memory, (steps, states) as floats, in
// pieces of four states of a step or four steps of a state. kKeep: their addresses in registers.
template <class T, class Shape, bool kKeep> struct MatrixLoader {
  static constexpr int kFour = 4, kPieces = kSteps * Shape::kStates / kFour;
  static constexpr int kPerThread = kPieces / 32, kAhead = kPerThread < 2 ? kPerThread : 2;

  const Matrix& m;
  const Place<Shape>& place;
  int states;
  int states_first;      // whether they are next to each other in memory
  const T* first[kKeep ? kAhead : 1];
  alignas(16) T ahead[kAhead][kFour];

  __device__ __forceinline__ MatrixLoader(const Matrix& m, const Place<Shape>& place, int states)
      : m(m), place(place), states(states),
        states_first(opaque(int(magnitude(m.state) <= magnitude(m.time)))) {
#pragma unroll
    for (int i = 0; kKeep && i < kAhead; i++) first[i] = address(position(i));
  }

  // The i-th piece of this thread: its first step and state in a tile.
  struct Position { int piece, t, n; };
  __device__ __forceinline__ Position position(int i) const {
    constexpr int kInStates = Shape::kStates / kFour, kInSteps = kSteps / kFour;
    int piece = i * place.threads + place.thread;
    return {piece, states_first ? piece / kInStates : piece % kInSteps * kFour,
            states_first ? piece % kInStates * kFour : piece / kInSteps};
  }

  __device__ __forceinline__ const T* address(const Position& position) const {
    return static_cast<const T*>(m.data) + place.batch * m.batch + place.group * m.group
        + place.time(position.t) * m.time + position.n * m.state;
  }

  __device__ __forceinline__ void load(const Position& position, const T* first, int tile, int steps,
                                       T (&values)[kFour]) const {
    const int64_t of_time = place.step * m.time;
    const bool whole = steps == kSteps && states == Shape::kStates;
    const int count = whole ? kFour
        : states_first ? existing(position.t < steps, states - position.n, kFour)
                       : existing(position.n < states, steps - position.t, kFour);
    Neighbours<const T, kFour>(first, states_first ? m.state : of_time, kSteps * of_time)
        .load(tile, count, values);
  }
  __device__ __forceinline__ void put(const Position& position, const T (&values)[kFour],
                                      float* tile) const {
    alignas(16) float wide[kFour];
#pragma unroll
    for (int i = 0; i < kFour; i++) wide[i] = to_float(values[i]);
    float* to = tile + position.t * Shape::kPitch + position.n;
    if (states_first) return copy_words<kFour>(to, wide);
#pragma unroll
    for (int i = 0; i < kFour; i++) to[i * Shape::kPitch] = wide[i];
  }

  __device__ __forceinline__ void fetch(int tile, int steps) {
    if (!m.varying) return;
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      if (position(i).piece >= kPieces) break;
      load(position(i), kKeep ? first[kKeep ? i : 0] : address(position(i)), tile, steps, ahead[i]);
    }
  }
  __device__ __forceinline__ void store(int tile, int steps, float* shared) const {
    if (!m.varying) return;
#pragma unroll
    for (int i = 0; i < kAhead; i++)
      if (position(i).piece < kPieces) put(position(i), ahead[i], shared);
    for (int i = kAhead; i < kPerThread && position(i).piece < kPieces; i++) {
      alignas(16) T values[kFour];     // of many states: the rest, straight away
      load(position(i), address(position(i)), tile, steps, values);
      put(position(i), values, shared);
    }
  }
};

}  // namespace mmvim
