// What forward and backward of the scan share: which channels a task owns, and how its arguments
// are brought into vectors.
//
// Lanes are neighbouring channels of one group, so B_t and C_t are scalars to a vector, and the
// sums over states need no shuffles: 2.2 times as fast as states in lanes with AVX-512, 1.3 times
// with AVX2 (16 states, Zen 5). Time runs in segments outside, blocks of channels inside: the
// memory of (batch, length, channels) tensors is then read in order, and B and C are packed once
// per segment.
#pragma once
#include "tile.h"

namespace {

// States that are worked through together, their h in registers.
constexpr int kStates = kBytes == 64 ? 8 : 4;
// Of N states, those whose decays are computed in turns. They have sums of their own, too.
template <int N> constexpr int kTurns = N % 2 ? 1 : 2;

// A task: blocks of channels [first, last) of one group and batch element.
template <class T> struct Task {
  int64_t batch, group, split, first, last, per_group;

  MMVIM_INLINE Task(const mmvim::ScanArgs<T>& args, int64_t index) {
    split = index % args.splits;
    group = index / args.splits % args.groups;
    batch = index / args.splits / args.groups;
    per_group = args.channels / args.groups;
    int64_t blocks = (per_group + kLanes<T> - 1) / kLanes<T>;
    first = split * blocks / args.splits;
    last = (split + 1) * blocks / args.splits;
  }
  MMVIM_INLINE int64_t channel(int64_t block) const {
    return group * per_group + block * kLanes<T>;
  }
  // Where the work after this block is: in the next one or, after the last, in the first one later.
  MMVIM_INLINE Window after(int64_t block, int64_t time, int64_t later) const {
    return block + 1 < last ? Window{batch, channel(block + 1), time}
                            : Window{batch, channel(first), later};
  }
  MMVIM_INLINE int lanes(int64_t block) const {
    int64_t left = per_group - block * kLanes<T>;
    return int(left < kLanes<T> ? left : kLanes<T>);
  }
};

// The largest number of blocks that one task can own.
template <class T> int64_t most_blocks(const mmvim::ScanArgs<T>& args) {
  int64_t blocks = (args.channels / args.groups + kLanes<T> - 1) / kLanes<T>;
  return (blocks + args.splits - 1) / args.splits;
}

// One (channels, states) matrix as `states` vectors.
template <class T>
MMVIM_INLINE void load_states(Vec<T>* to, const T* from, int64_t channel, int64_t state,
                              int64_t states, int lanes) {
  for (int64_t n = 0; n < states; n++) to[n] = load_lanes(from + n * state, channel, lanes);
}
template <class T>
MMVIM_INLINE void store_states(const Vec<T>* from, T* to, int64_t channel, int64_t state,
                               int64_t states, int lanes) {
  for (int64_t n = 0; n < states; n++) store_lanes(to + n * state, channel, lanes, from[n]);
}

// A constant B or C as `states` vectors; nothing where it varies.
template <class T>
MMVIM_INLINE void load_constant(Vec<T>* to, const mmvim::Matrix<T>& m, int64_t channel,
                                int64_t states, int lanes) {
  if (!m.varying)
    load_states(to, m.data + channel * m.channel, m.channel, m.state, states, lanes);
}

// B or C of these steps as (steps, states), contiguous.
template <class T>
void pack(T* to, const mmvim::Matrix<T>& m, int64_t batch, int64_t group, int64_t time, int steps,
          int64_t states) {
  const T* from = m.data + batch * m.batch + group * m.group + time * m.time;
  if (m.state == 1) {
    for (int t = 0; t < steps; t++)
      for (int64_t n = 0; n < states; n++) to[t * states + n] = from[t * m.time + n];
  } else {
    for (int64_t n = 0; n < states; n++)
      for (int t = 0; t < steps; t++) to[t * states + n] = from[t * m.time + n * m.state];
  }
}

// B or C as the inner loops read it: a scalar per step and state, or a vector per state.
template <class T, bool kVarying> struct Coefficient;
template <class T> struct Coefficient<T, true> {
  const T* data;
  int64_t states;
  MMVIM_INLINE Vec<T> at(int t, int n) const { return splat(data[t * states + n]); }
};
template <class T> struct Coefficient<T, false> {
  const Vec<T>* data;
  MMVIM_INLINE Vec<T> at(int, int n) const { return data[n]; }
};

// Call f(first state, number of states as a constant) over all states.
template <class Function> MMVIM_INLINE void over_states(int64_t states, const Function& f) {
  int64_t n = 0;
  for (; n + kStates <= states; n += kStates) f(n, std::integral_constant<int, kStates>());
  for (; n < states; n++) f(n, std::integral_constant<int, 1>());
}

// Call f with B and C as Coefficients that start at state n.
template <class T, class Function>
MMVIM_INLINE void with_coefficients(const mmvim::ScanArgs<T>& args, const T* B, const T* C,
                                    const Vec<T>* B_constant, const Vec<T>* C_constant, int64_t n,
                                    const Function& f) {
  const Coefficient<T, true> vary_B{B + n, args.states}, vary_C{C + n, args.states};
  const Coefficient<T, false> const_B{B_constant + n}, const_C{C_constant + n};
  if (args.B.varying) {
    if (args.C.varying) f(vary_B, vary_C); else f(vary_B, const_C);
  } else {
    if (args.C.varying) f(const_B, vary_C); else f(const_B, const_C);
  }
}

// The largest |x| of each lane, NaN where there is one.
template <class V> MMVIM_INLINE V largest(const V* x, int64_t count) {
  V found{};
  if constexpr (kBoundedIsFaster<V>)
    for (int64_t i = 0; i < count; i++) found = largest(found, x[i]);
  return found;
}

// Δ of a tile in place: add the bias, apply the softplus; its derivative where wanted.
template <bool kDerivative, class V>
MMVIM_INLINE void step_sizes(V* delta, V* derivative, V bias, bool softplus_, int steps) {
  if (softplus_) {
    for (int t = 0; t < steps; t++) {
      V slope;
      delta[t] = softplus(delta[t] + bias, slope);
      if (kDerivative) derivative[t] = slope;
    }
  } else {
    for (int t = 0; t < steps; t++) {
      delta[t] += bias;
      if (kDerivative) derivative[t] = V{} + 1;
    }
  }
}

// Call f with whether |Δ A| is known to be at most kBound, as a constant. `reach` is the largest |A|
// of each lane.
template <class V, class Function>
MMVIM_INLINE void with_bound(const V* delta, V reach, int steps, const Function& f) {
  if constexpr (kBoundedIsFaster<V>) {
    V most = largest(delta, steps) * reach;
    bool bounded = true;
    for (unsigned i = 0; i < sizeof(V) / sizeof(most[0]); i++) bounded &= most[i] <= kBound;
    if (bounded) return f(std::true_type());
  }
  f(std::false_type());
}

}  // namespace
