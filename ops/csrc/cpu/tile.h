// A tile is `steps` vectors: time goes down, the lanes are neighbouring channels. Loading and
// storing hide the strides: (batch, length, channels) memory is read as vectors, (batch, channels,
// length) memory through transposes in registers, anything else element by element.
#pragma once
#include <utility>

#include "args.h"
#include "vec.h"

namespace {

// Lanes I of a and, counted on, b.
template <int... I, class V> MMVIM_INLINE V shuffle(V a, V b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, I...);
#else
  const decltype(a < b) lanes = {I...};
  return __builtin_shuffle(a, b, lanes);
#endif
}

// Exchange the off-diagonal quarters of the lanes of a and b at distance S.
template <int S, class V, int... I>
MMVIM_INLINE void exchange(V& a, V& b, std::integer_sequence<int, I...>) {
  constexpr int W = sizeof...(I);
  V x = shuffle<((I & S) ? W + (I ^ S) : I)...>(a, b);
  V y = shuffle<((I & S) ? W + I : (I ^ S))...>(a, b);
  a = x;
  b = y;
}

template <class T, int S = kLanes<T> / 2> MMVIM_INLINE void transpose(Vec<T>* rows) {
  if constexpr (S > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; i++)
      if (!(i & S)) exchange<S>(rows[i], rows[i | S], std::make_integer_sequence<int, kLanes<T>>());
    transpose<T, S / 2>(rows);
  }
}

template <int S, class V, int... I>
MMVIM_INLINE V rotated(V x, std::integer_sequence<int, I...>) {
  return shuffle<(I ^ S)...>(x, x);
}

// Sum of the lanes.
template <class T, int S = kLanes<T> / 2> MMVIM_INLINE T sum(Vec<T> x) {
  if constexpr (S == 0) {
    return x[0];
  } else {
    return sum<T, S / 2>(x + rotated<S>(x, std::make_integer_sequence<int, kLanes<T>>()));
  }
}

template <class T> MMVIM_INLINE Vec<T> load_lanes(const T* p, int64_t stride, int lanes) {
  constexpr int W = kLanes<T>;
  if (lanes == W && stride == 1) return load(p);
  Vec<T> x{};
  for (int i = 0; i < lanes; i++) x[i] = p[i * stride];
  return x;
}

template <class T> MMVIM_INLINE void store_lanes(T* p, int64_t stride, int lanes, Vec<T> x) {
  constexpr int W = kLanes<T>;
  if (lanes == W && stride == 1) return store(p, x);
  for (int i = 0; i < lanes; i++) p[i * stride] = x[i];
}

// Rows t to t + W of a tile from memory where time is contiguous, forwards or backwards.
template <class T>
MMVIM_INLINE void load_square(Vec<T>* rows, const T* p, int64_t channel, int64_t time) {
  constexpr int W = kLanes<T>;
  Vec<T> square[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) square[i] = load(p + i * channel + (time < 0 ? 1 - W : 0));
  transpose<T>(square);
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) rows[time < 0 ? W - 1 - i : i] = square[i];
}

template <class T>
MMVIM_INLINE void store_square(const Vec<T>* rows, T* p, int64_t channel, int64_t time) {
  constexpr int W = kLanes<T>;
  Vec<T> square[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) square[i] = rows[time < 0 ? W - 1 - i : i];
  transpose<T>(square);
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) store(p + i * channel + (time < 0 ? 1 - W : 0), square[i]);
}

// Missing lanes are filled with zeros.
template <class T>
__attribute__((noinline)) void load_tile(Vec<T>* tile, const T* p, int64_t channel, int64_t time,
                                         int steps, int lanes) {
  constexpr int W = kLanes<T>;
  int t = 0;
  if (lanes == W && (time == 1 || time == -1) && channel != 1)
    for (; t + W <= steps; t += W) load_square<T>(tile + t, p + t * time, channel, time);
  if (lanes == W && channel == 1)
    for (; t < steps; t++) tile[t] = load(p + t * time);
  for (; t < steps; t++) tile[t] = load_lanes(p + t * time, channel, lanes);
}

template <class T>
__attribute__((noinline)) void store_tile(const Vec<T>* tile, T* p, int64_t channel, int64_t time,
                                          int steps, int lanes) {
  constexpr int W = kLanes<T>;
  int t = 0;
  if (lanes == W && (time == 1 || time == -1) && channel != 1)
    for (; t + W <= steps; t += W) store_square<T>(tile + t, p + t * time, channel, time);
  if (lanes == W && channel == 1)
    for (; t < steps; t++) store(p + t * time, tile[t]);
  for (; t < steps; t++) store_lanes(p + t * time, channel, lanes, tile[t]);
}

// Where a batch element, channel and time of a sequence is.
template <class T>
MMVIM_INLINE T* at(const mmvim::Sequence<T>& s, int64_t batch, int64_t channel, int64_t time) {
  return s.data + batch * s.batch + channel * s.channel + time * s.time;
}

template <class T> MMVIM_INLINE mmvim::Sequence<const T> readable(const mmvim::Sequence<T>& s) {
  return {s.data, s.batch, s.channel, s.time};
}

// The same channels and steps of any sequence.
struct Window {
  int64_t batch, channel, time;
  int steps, lanes;
};

template <class T>
MMVIM_INLINE void load_tile(Vec<T>* tile, const mmvim::Sequence<const T>& s, const Window& w) {
  load_tile<T>(tile, at(s, w.batch, w.channel, w.time), s.channel, s.time, w.steps, w.lanes);
}
template <class T>
MMVIM_INLINE void store_tile(const Vec<T>* tile, const mmvim::Sequence<T>& s, const Window& w) {
  store_tile<T>(tile, at(s, w.batch, w.channel, w.time), s.channel, s.time, w.steps, w.lanes);
}

// The cache lines of a tile.
template <class T> struct Lines {
  const T* first = nullptr;
  int64_t apart = 0, next = 0;     // of two lines, and of two groups of kLanes lines

  MMVIM_INLINE void fetch(int i) const {
    __builtin_prefetch(first + i % kLanes<T> * apart + i / kLanes<T> * next);
  }
};

template <class T> struct SomeLines {
  const Lines<T>* lines;
  int count;
  MMVIM_INLINE void fetch(int i) const {
    for (int j = 0; j < count; j++) lines[j].fetch(i);
  }
};

// The tiles that are loaded and stored next. Their lines are asked for one by one while something is
// computed, a share of the tiles in each of a number of loops: all lines at once would be more than a
// processor can wait for.
template <class T> class Ahead {
  Lines<T> lines[7];
  const int loops;
  int count = 0, taken = 0;

public:
  MMVIM_INLINE explicit Ahead(int loops) : loops(loops) {}
  template <class X> MMVIM_INLINE void add(const mmvim::Sequence<X>& s, const Window& w) {
    if (!s.data) return;
    int64_t apart = s.channel == 1 ? s.time : s.channel;
    lines[count++] = {at(s, w.batch, w.channel, w.time), apart, s.time * kLanes<T>};
  }
  MMVIM_INLINE SomeLines<T> share() {
    int from = taken, all = (count + loops - 1) / loops;
    taken = from + all < count ? from + all : count;
    return {lines + from, taken - from};
  }
};

// Hands out pieces of one allocation, each aligned for vectors. Started at null it only counts.
struct Arena {
  char* next;
  template <class X> X* take(int64_t count) {
    char* p = next;
    next += (count * int64_t(sizeof(X)) + 63) / 64 * 64;
    return reinterpret_cast<X*>(p);
  }
};

}  // namespace
