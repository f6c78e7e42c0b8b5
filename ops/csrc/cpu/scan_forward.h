// The scan, forward.
#pragma once
#include "scan_common.h"

namespace {

// Steps whose vectors are in the first-level cache together. (batch, length, channels) memory of so
// few lies in so few pages that the processor remembers where they are.
constexpr int kTile = 32;
static_assert(mmvim::kSegment % kTile == 0, "checkpoints are taken at the ends of tiles");

// h and y of some states over one tile; y is added to.
template <int N, bool kBounded, class T, class MB, class MC>
__attribute__((noinline)) void advance(int steps, const Vec<T>* delta, const Vec<T>* scaled,
                                       Vec<T>* y, const Vec<T>* A, MB B, MC C, Vec<T>* state,
                                       SomeLines<T> ahead) {
  Vec<T> h[N];
  for (int n = 0; n < N; n++) h[n] = state[n];
  for (int t = 0; t < steps; t++) {
    ahead.fetch(t);
    Vec<T> d = delta[t], x = scaled[t], sum[kTurns<N>] = {y[t]};
#pragma GCC unroll 16
    for (int m = 0; m < N; m += kTurns<N>) {
      Vec<T> decay[kTurns<N>];
      decays<kBounded>(d, A + m, decay);
      for (int i = 0, n = m; i < kTurns<N>; i++, n++) {
        h[n] = fma(decay[i], h[n], B.at(t, n) * x);
        sum[i] = fma(h[n], C.at(t, n), sum[i]);
      }
    }
    y[t] = kTurns<N> == 2 ? sum[0] + sum[kTurns<N> - 1] : sum[0];
  }
  for (int n = 0; n < N; n++) state[n] = h[n];
}

template <class T> struct Forward {
  using V = Vec<T>;
  const mmvim::ScanArgs<T>& args;
  V *A, *h, *B_constant, *C_constant;         // per block and state
  V* reach;                                   // per block: the largest |A|
  V *u, *delta, *scaled, *y;                  // per step
  T *B, *C;                                   // (steps, states)

  Forward(const mmvim::ScanArgs<T>& args, Arena& arena) : args(args) {
    int64_t matrix = most_blocks(args) * args.states;
    A = arena.take<V>(matrix);
    h = arena.take<V>(matrix);
    B_constant = arena.take<V>(args.B.varying ? 0 : matrix);
    C_constant = arena.take<V>(args.C.varying ? 0 : matrix);
    reach = arena.take<V>(most_blocks(args));
    for (V** tile : {&u, &delta, &scaled, &y}) *tile = arena.take<V>(kTile);
    B = arena.take<T>(kTile * args.states);
    C = arena.take<T>(kTile * args.states);
  }

  void run(const Task<T>& task) {
    const int64_t N = args.states;
    for (int64_t k = task.first; k < task.last; k++) {
      int64_t c = task.channel(k), i = (k - task.first) * N;
      int lanes = task.lanes(k);
      load_states(A + i, args.A + c * N, N, 1, N, lanes);
      for (int64_t n = i; n < i + N; n++) A[n] *= kDecayScale<T>, h[n] = V{};
      reach[k - task.first] = largest(A + i, N);
      if (args.first_state) load_states(h + i, states_of(args.first_state, task, c), N, 1, N, lanes);
      load_constant(B_constant + i, args.B, c, N, lanes);
      load_constant(C_constant + i, args.C, c, N, lanes);
    }
    for (int64_t time = 0; time < args.length; time += kTile) {
      int steps = int(args.length - time < kTile ? args.length - time : kTile);
      if (args.B.varying) pack(B, args.B, task.batch, task.group, time, steps, N);
      if (args.C.varying) pack(C, args.C, task.batch, task.group, time, steps, N);
      for (int64_t k = task.first; k < task.last; k++)
        tile(Window{task.batch, task.channel(k), time, steps, task.lanes(k)},
             task.after(k, time, time + kTile), k - task.first);
    }
    for (int64_t k = task.first; args.last_state && k < task.last; k++)
      store_states(h + (k - task.first) * N, states_of(args.last_state, task, task.channel(k)), N,
                   1, N, task.lanes(k));
  }

  template <class X> X* states_of(X* all, const Task<T>& task, int64_t channel) const {
    return all + (task.batch * args.channels + channel) * args.states;
  }

  void tile(const Window& w, const Window& next, int64_t block) {
    const int64_t i = block * args.states;
    load_tile(u, args.u, w);
    load_tile(delta, args.delta, w);
    V bias = args.delta_bias ? load_lanes(args.delta_bias + w.channel, 1, w.lanes) : V{};
    V D = args.D ? load_lanes(args.D + w.channel, 1, w.lanes) : V{};
    step_sizes<false>(delta, delta, bias, args.softplus, w.steps);
    if (args.D) {
      for (int t = 0; t < w.steps; t++) y[t] = D * u[t];
    } else {
      for (int t = 0; t < w.steps; t++) y[t] = V{};
    }
    for (int t = 0; t < w.steps; t++) scaled[t] = delta[t] * u[t];
    Ahead<T> ahead(args.states > kStates ? 2 : 1);
    ahead.add(args.u, next), ahead.add(args.delta, next);
    ahead.add(args.z, next), ahead.add(args.out, next);
    with_bound(delta, reach[block], w.steps, [&](auto bounded) {
      over_states(args.states, [&](int64_t n, auto count) {
        constexpr int kCount = decltype(count)::value;
        with_coefficients(args, B, C, B_constant + i, C_constant + i, n, [&](auto mB, auto mC) {
          advance<kCount, decltype(bounded)::value, T>(w.steps, delta, scaled, y, A + i + n, mB, mC,
                                                       h + i + n, ahead.share());
        });
      });
    });
    finish(w);

    int64_t end = w.time + w.steps, segment = end / mmvim::kSegment;
    if (args.checkpoints && end % mmvim::kSegment == 0 && end < args.length) {
      int64_t saved = (args.length - 1) / mmvim::kSegment;
      T* to = args.checkpoints + (w.batch * saved + segment - 1) * args.states * args.channels;
      store_states(h + i, to + w.channel, 1, args.channels, args.states, w.lanes);
    }
  }

  // Gate y and write it out.
  void finish(const Window& w) {
    if (args.finish == mmvim::Finish::kAddAndGate) {
      load_tile(u, readable(args.out), w);
      for (int t = 0; t < w.steps; t++) y[t] += u[t];
    }
    if (args.finish != mmvim::Finish::kKeep) {
      V scale = splat(args.scale);
      if (args.z.data) {
        load_tile(u, args.z, w);
        for (int t = 0; t < w.steps; t++) y[t] *= silu(u[t]) * scale;
      } else if (args.scale != T(1)) {
        for (int t = 0; t < w.steps; t++) y[t] *= scale;
      }
    }
    store_tile(y, args.out, w);
  }
};

template <class T>
void scan_forward(const mmvim::ScanArgs<T>& args, int64_t begin, int64_t end, char* scratch) {
  Arena arena{scratch};
  Forward<T> forward(args, arena);
  for (int64_t i = begin; i < end; i++) forward.run(Task<T>(args, i));
}

}  // namespace
