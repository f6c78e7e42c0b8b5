// How tiles of B and C come from memory into shared memory: in pieces of neighbours, in words of up
// to 16 bytes wherever they lie in a row that begins at a multiple of that, else one by one.
#pragma once
#include "scan_common.h"

namespace mmvim {

__device__ __forceinline__ int64_t magnitude(int64_t x) { return x < 0 ? -x : x; }

// A tile of B or C on its way through registers into shared memory, (steps, states) as floats, in
// pieces of four states of a step or four steps of a state, whichever are next to each other in
// memory. kConstant: it may not vary at all.
template <class T, class Shape, bool kConstant> struct MatrixLoader {
  static constexpr int kSteps = Shape::kSteps;
  static constexpr int kFour = 4, kPieces = kSteps * Shape::kStates / kFour;
  static constexpr int kPerThread = kPieces / 32, kAhead = kPerThread < 2 ? kPerThread : 2;

  // Of a tile: from where in the first one, to where in shared memory, its first step and state.
  struct Piece {
    const T* from;
    int to, t, n;
  };

  const Place<Shape>& place;
  int states;
  bool varying, states_first, in_words;     // in_words: whole pieces can be read at once
  int64_t apart, tiles_apart;               // between the four, between tiles
  int64_t of_time, of_state;
  const T* line;
  Piece pieces[kAhead];
  alignas(16) T ahead[kAhead][kFour];

  __device__ __forceinline__ MatrixLoader(const Matrix& m, const Place<Shape>& place, int states)
      : place(place), states(states), varying(!kConstant || m.varying),
        states_first(magnitude(m.state) <= magnitude(m.time)), of_time(m.time), of_state(m.state) {
    line = static_cast<const T*>(m.data) + place.batch * m.batch + place.group * m.group;
    in_words = m.state == 1 && states == Shape::kStates && m.time % kFour == 0
        && reinterpret_cast<uintptr_t>(line) % (kFour * sizeof(T)) == 0;
    apart = states_first ? m.state : place.step * m.time, tiles_apart = kSteps * place.step * m.time;
#pragma unroll
    for (int i = 0; i < kAhead; i++) pieces[i] = piece(i);
  }

  // The i-th one of this thread.
  __device__ __forceinline__ Piece piece(int i) const {
    constexpr int kInStates = Shape::kStates / kFour, kInSteps = kSteps / kFour;
    const int k = i * place.threads + place.thread;
    const int t = states_first ? k / kInStates : k % kInSteps * kFour;
    const int n = states_first ? k % kInStates * kFour : k / kInSteps;
    return {line + place.time(t) * of_time + n * of_state, k < kPieces ? t * Shape::kStates + n : -1,
            t, n};
  }

  __device__ __forceinline__ void load(const Piece& piece, int tile, int steps,
                                       T (&values)[kFour]) const {
    const T* from = piece.from + tile * tiles_apart;
    if (in_words && steps == kSteps) return copy_words<kFour>(values, from);
    const int count = states_first ? (piece.t < steps ? states - piece.n : 0)
                                   : (piece.n < states ? steps - piece.t : 0);
#pragma unroll
    for (int i = 0; i < kFour; i++) {
      assign(values[i], 0.f);
      if (i < count) values[i] = from[i * apart];
    }
  }
  __device__ __forceinline__ void put(const Piece& piece, const T (&values)[kFour],
                                      float* tile) const {
    alignas(16) float wide[kFour];
#pragma unroll
    for (int i = 0; i < kFour; i++) wide[i] = to_float(values[i]);
    if (states_first) return copy_words<kFour>(tile + piece.to, wide);
#pragma unroll
    for (int i = 0; i < kFour; i++) tile[piece.to + i * Shape::kStates] = wide[i];
  }

  __device__ __forceinline__ void fetch(int tile, int steps) {
    if (!varying) return;
#pragma unroll
    for (int i = 0; i < kAhead; i++)
      if (pieces[i].to >= 0) load(pieces[i], tile, steps, ahead[i]);
  }
  __device__ __forceinline__ void store(int tile, int steps, float* shared) const {
    if (!varying) return;
#pragma unroll
    for (int i = 0; i < kAhead; i++)
      if (pieces[i].to >= 0) put(pieces[i], ahead[i], shared);
    for (int i = kAhead; i < kPerThread; i++) {     // of many states: the rest, straight away
      const Piece rest = piece(i);
      if (rest.to < 0) break;
      alignas(16) T values[kFour];
      load(rest, tile, steps, values);
      put(rest, values, shared);
    }
  }
};

}  // namespace mmvim
