// The gradients of the scan.
//
// Per segment, from the last to the first: the states are computed again from the checkpoint at its
// start and kept with their decays, then the adjoint recurrence runs back over them. With g the
// gradient of y, G_t = C_t g_t + X_{t+1} the gradient that reaches h_t and X_t = exp(Δ_t A) G_t
// what goes on to h_{t-1}:
//   ∂B_t = G_t Δ_t u_t   ∂C_t = h_t g_t   ∂(Δ_t u_t) = B_t · G_t   ∂(Δ_t A) = X_t h_{t-1}
// Sums over channels are kept as vectors while blocks of channels are added, and only then over
// the lanes.
#pragma once
#include "scan_forward.h"

namespace {

// Forward over a segment from the states `start`. What backward needs of every step is kept, kStates
// vectors a step: the decay, and h before it.
template <int N, bool kBounded, class T, class MB, class MC>
__attribute__((noinline)) void record(int steps, const Vec<T>* delta, const Vec<T>* scaled,
                                      const Vec<T>* g, Vec<T>* y, const Vec<T>* A, MB B, MC C,
                                      const Vec<T>* start, Vec<T>* decays, Vec<T>* before,
                                      Vec<T>* grad_C, int64_t grad_stride, SomeLines<T> ahead) {
  Vec<T> h[N];
  for (int n = 0; n < N; n++) h[n] = start[n];
  for (int t = 0; t < steps; t++) {
    ahead.fetch(t);
    Vec<T> d = delta[t], x = scaled[t], gt = g[t], sum = y[t];
#pragma GCC unroll 16
    for (int n = 0; n < N; n++) {
      Vec<T> a[1];
      ::decays<kBounded>(d, A + n, a);
      before[t * kStates + n] = h[n];
      decays[t * kStates + n] = a[0];
      h[n] = fma(a[0], h[n], B.at(t, n) * x);
      sum = fma(h[n], C.at(t, n), sum);
      grad_C[t * grad_stride + n] = fma(h[n], gt, grad_C[t * grad_stride + n]);
    }
    y[t] = sum;
  }
}

// Backward over the segment: X is carried on, the gradients are added to.
template <int N, class T, class MB, class MC>
__attribute__((noinline)) void retreat(int steps, const Vec<T>* delta, const Vec<T>* scaled,
                                       const Vec<T>* g, const Vec<T>* A, MB B, MC C,
                                       const Vec<T>* decays, const Vec<T>* before,
                                       Vec<T>* grad_B, int64_t grad_stride, Vec<T>* carried,
                                       Vec<T>* grad_A, Vec<T>* grad_scaled, Vec<T>* grad_delta,
                                       SomeLines<T> ahead) {
  Vec<T> X[N], dA[N];
  for (int n = 0; n < N; n++) X[n] = carried[n], dA[n] = grad_A[n];
  for (int t = steps - 1; t >= 0; t--) {
    ahead.fetch(t);
    Vec<T> d = delta[t], x = scaled[t], gt = g[t], sum = grad_scaled[t], sum_delta = grad_delta[t];
#pragma GCC unroll 16
    for (int n = 0; n < N; n++) {
      Vec<T> G = fma(C.at(t, n), gt, X[n]);
      grad_B[t * grad_stride + n] = fma(G, x, grad_B[t * grad_stride + n]);
      sum = fma(G, B.at(t, n), sum);
      X[n] = decays[t * kStates + n] * G;
      Vec<T> e = X[n] * before[t * kStates + n];
      dA[n] = fma(e, d, dA[n]);
      sum_delta = fma(e, A[n], sum_delta);
    }
    grad_scaled[t] = sum;
    grad_delta[t] = sum_delta;
  }
  for (int n = 0; n < N; n++) carried[n] = X[n], grad_A[n] = dA[n];
}

template <class T> struct Backward {
  using V = Vec<T>;
  static constexpr int kSteps = int(mmvim::kSegment);
  const mmvim::ScanArgs<T>& args;
  // per block and state: A, A for `decay`, X, and the sums over time
  V *A, *A_scaled, *X, *B_constant, *C_constant, *grad_A, *grad_B_constant, *grad_C_constant;
  V *reach, *grad_D, *grad_bias;              // per block; reach is the largest |A_scaled|
  V *u, *delta, *slope, *scaled, *gate, *g, *y, *grad_u, *grad_delta;    // per step; gate is σ(z)
  V *start;                                   // per state
  V *decays, *before;                         // (steps, kStates)
  V *grad_B, *grad_C;                         // (steps, states)
  T *B, *C;                                   // (steps, states)

  Backward(const mmvim::ScanArgs<T>& args, Arena& arena) : args(args) {
    const int64_t blocks = most_blocks(args), N = args.states;
    for (V** matrix : {&A, &A_scaled, &X, &grad_A}) *matrix = arena.take<V>(blocks * N);
    const int64_t in_B = args.B.varying ? 0 : blocks * N, in_C = args.C.varying ? 0 : blocks * N;
    for (V** matrix : {&B_constant, &grad_B_constant}) *matrix = arena.take<V>(in_B);
    for (V** matrix : {&C_constant, &grad_C_constant}) *matrix = arena.take<V>(in_C);
    for (V** vector : {&reach, &grad_D, &grad_bias}) *vector = arena.take<V>(blocks);
    for (V** tile : {&u, &delta, &slope, &scaled, &gate, &g, &y, &grad_u, &grad_delta})
      *tile = arena.take<V>(kSteps);
    start = arena.take<V>(N);
    for (V** tile : {&decays, &before}) *tile = arena.take<V>(kSteps * kStates);
    for (V** tile : {&grad_B, &grad_C}) *tile = arena.take<V>(kSteps * N);
    for (T** tile : {&B, &C}) *tile = arena.take<T>(kSteps * N);
  }

  void run(const Task<T>& task) {
    const int64_t N = args.states;
    for (int64_t k = task.first; k < task.last; k++) begin(task, k);
    for (int64_t segment = (args.length - 1) / kSteps; segment >= 0; segment--) {
      int64_t time = segment * kSteps;
      int steps = int(args.length - time < kSteps ? args.length - time : kSteps);
      if (args.B.varying) {
        pack(B, args.B, task.batch, task.group, time, steps, N);
        for (int64_t i = 0; i < steps * N; i++) grad_B[i] = V{};
      }
      if (args.C.varying) {
        pack(C, args.C, task.batch, task.group, time, steps, N);
        for (int64_t i = 0; i < steps * N; i++) grad_C[i] = V{};
      }
      for (int64_t k = task.first; k < task.last; k++)
        tile(Window{task.batch, task.channel(k), time, steps, task.lanes(k)},
             task.after(k, time, time - kSteps), k - task.first);
      int64_t row = (task.split * args.batch + task.batch) * args.groups + task.group;
      int64_t to = row * args.length * N + time * args.grad_time;
      if (args.B.varying) sum_lanes(grad_B, args.grad_B + to, steps);
      if (args.C.varying) sum_lanes(grad_C, args.grad_C + to, steps);
    }
    for (int64_t k = task.first; k < task.last; k++) end(task, k);
  }

  void begin(const Task<T>& task, int64_t k) {
    const int64_t N = args.states, c = task.channel(k), i = (k - task.first) * N;
    const int64_t row = task.batch * args.channels + c;
    int lanes = task.lanes(k);
    load_states(A + i, args.A + c * N, N, 1, N, lanes);
    for (int64_t n = i; n < i + N; n++)
      A_scaled[n] = A[n] * kDecayScale<T>, grad_A[n] = X[n] = V{};
    reach[k - task.first] = largest(A_scaled + i, N);
    if (args.grad_last_state)
      load_states(X + i, args.grad_last_state + row * N, N, 1, N, lanes);
    load_constant(B_constant + i, args.B, c, N, lanes);
    load_constant(C_constant + i, args.C, c, N, lanes);
    for (int64_t n = i; !args.B.varying && n < i + N; n++) grad_B_constant[n] = V{};
    for (int64_t n = i; !args.C.varying && n < i + N; n++) grad_C_constant[n] = V{};
    grad_D[k - task.first] = grad_bias[k - task.first] = V{};
  }

  void end(const Task<T>& task, int64_t k) {
    const int64_t N = args.states, i = (k - task.first) * N;
    const int64_t row = task.batch * args.channels + task.channel(k);
    int lanes = task.lanes(k);
    store_states(grad_A + i, args.grad_A + row * N, N, 1, N, lanes);
    if (!args.B.varying) store_states(grad_B_constant + i, args.grad_B + row * N, N, 1, N, lanes);
    if (!args.C.varying) store_states(grad_C_constant + i, args.grad_C + row * N, N, 1, N, lanes);
    if (args.grad_D) store_lanes(args.grad_D + row, 1, lanes, grad_D[k - task.first]);
    if (args.grad_delta_bias)
      store_lanes(args.grad_delta_bias + row, 1, lanes, grad_bias[k - task.first]);
    if (args.grad_first_state) store_states(X + i, args.grad_first_state + row * N, N, 1, N, lanes);
  }

  void sum_lanes(const V* from, T* to, int steps) {
    for (int t = 0; t < steps; t++)
      for (int64_t n = 0; n < args.states; n++)
        to[t * args.grad_time + n] = sum<T>(from[t * args.states + n]);
  }

  void tile(const Window& w, const Window& next, int64_t block) {
    const int64_t N = args.states, i = block * N;
    V bias = args.delta_bias ? load_lanes(args.delta_bias + w.channel, 1, w.lanes) : V{};
    V D = args.D ? load_lanes(args.D + w.channel, 1, w.lanes) : V{};
    load_tile(u, args.u, w);
    load_tile(delta, args.delta, w);
    step_sizes<true>(delta, slope, bias, args.softplus, w.steps);
    load_gradient(w);
    for (int t = 0; t < w.steps; t++) {
      y[t] = args.D ? D * u[t] : V{};
      scaled[t] = delta[t] * u[t];
      grad_u[t] = grad_delta[t] = V{};
    }
    load_checkpoint(w);
    Ahead<T> ahead(N > kStates ? 4 : 2);
    ahead.add(args.u, next), ahead.add(args.delta, next);
    ahead.add(args.grad_out, next), ahead.add(args.z, next);
    for (const auto& s : {args.grad_u, args.grad_delta, args.grad_z}) ahead.add(s, next);

    with_bound(delta, reach[block], w.steps, [&](auto bounded) {
      over_states(N, [&](int64_t n, auto count) {
        constexpr int kCount = decltype(count)::value;
        with_coefficients(args, B, C, B_constant + i, C_constant + i, n, [&](auto mB, auto mC) {
          // a constant matrix gathers its gradient over time, a varying one over blocks
          bool in_B = args.B.varying, in_C = args.C.varying;
          record<kCount, decltype(bounded)::value, T>(
              w.steps, delta, scaled, g, y, A_scaled + i + n, mB, mC, start + n, decays, before,
              in_C ? grad_C + n : grad_C_constant + i + n, in_C ? N : 0, ahead.share());
          retreat<kCount, T>(w.steps, delta, scaled, g, A + i + n, mB, mC, decays, before,
                             in_B ? grad_B + n : grad_B_constant + i + n, in_B ? N : 0, X + i + n,
                             grad_A + i + n, grad_u, grad_delta, ahead.share());
        });
      });
    });

    V sum_D = grad_D[block], sum_bias = grad_bias[block];
    for (int t = 0; t < w.steps; t++) {
      V grad_scaled = grad_u[t];
      grad_u[t] = args.D ? fma(g[t], D, grad_scaled * delta[t]) : grad_scaled * delta[t];
      grad_delta[t] = fma(grad_scaled, u[t], grad_delta[t]) * slope[t];
      sum_D = fma(g[t], u[t], sum_D);
      sum_bias += grad_delta[t];
    }
    grad_D[block] = sum_D;
    grad_bias[block] = sum_bias;
    store_tile(grad_u, args.grad_u, w);
    store_tile(grad_delta, args.grad_delta, w);
    finish(w);
  }

  // The states before the first step.
  void load_checkpoint(const Window& w) {
    int64_t segment = w.time / kSteps, saved = (args.length - 1) / kSteps;
    if (segment == 0) {
      for (int64_t n = 0; n < args.states; n++) start[n] = V{};
      if (!args.first_state) return;
      const T* from = args.first_state + (w.batch * args.channels + w.channel) * args.states;
      load_states(start, from, args.states, 1, args.states, w.lanes);
      return;
    }
    const T* from = args.checkpoints
        + (w.batch * saved + segment - 1) * args.states * args.channels + w.channel;
    load_states(start, from, 1, args.channels, args.states, w.lanes);
  }

  // g, the gradient of y before the gate.
  void load_gradient(const Window& w) {
    load_tile(g, args.grad_out, w);
    V scale = splat(args.scale);
    if (args.z.data) {
      load_tile(y, args.z, w);
      for (int t = 0; t < w.steps; t++) {
        gate[t] = sigmoid(y[t]);
        g[t] *= y[t] * gate[t] * scale;
      }
    } else if (args.scale != T(1)) {
      for (int t = 0; t < w.steps; t++) g[t] *= scale;
    }
  }

  // The gated output and the gradient of z, which need y of all directions.
  void finish(const Window& w) {
    if (!args.grad_z.data) return;
    if (args.finish == mmvim::Finish::kAddAndGate) {
      load_tile(u, readable(args.grad_z), w);
      for (int t = 0; t < w.steps; t++) y[t] += u[t];
    }
    if (args.finish != mmvim::Finish::kKeep) {
      load_tile(g, args.grad_out, w);
      load_tile(u, args.z, w);
      const V one = splat(T(1)), scale = splat(args.scale);
      for (int t = 0; t < w.steps; t++) {
        V s = gate[t];
        scaled[t] = y[t] * u[t] * s * scale;
        y[t] *= g[t] * scale * s * fma(u[t], one - s, one);
      }
      if (args.out.data) store_tile(scaled, args.out, w);
    }
    store_tile(y, args.grad_z, w);
  }
};

template <class T>
void scan_backward(const mmvim::ScanArgs<T>& args, int64_t begin, int64_t end, char* scratch) {
  Arena arena{scratch};
  Backward<T> backward(args, arena);
  for (int64_t i = begin; i < end; i++) backward.run(Task<T>(args, i));
}

template <class T> int64_t scan_scratch(const mmvim::ScanArgs<T>& args, bool backward) {
  Arena arena{nullptr};
  if (backward) {
    Backward<T> count(args, arena);
  } else {
    Forward<T> count(args, arena);
  }
  return int64_t(reinterpret_cast<intptr_t>(arena.next));
}

}  // namespace
