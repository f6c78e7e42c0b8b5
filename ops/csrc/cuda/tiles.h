// How tiles of B and C come from memory into shared memory: in pieces of neighbours, in words of up
// to 16 bytes wherever they lie in a row that begins at a multiple of that, else one by one.
#pragma once
#include <type_traits>

#include "scan_common.h"

namespace mmvim {

__device__ __forceinline__ int64_t magnitude(int64_t x) { return x < 0 ? -x : x; }

// How many of N elements from the given one on exist, along a line that exists itself or does not.
__device__ __forceinline__ int existing(bool line, int left, int N) {
  return !line || left < 0 ? 0 : left < N ? left : N;
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
