// What the scan operators and the mixer share: a direction's tensors, and running the kernels on them.
#pragma once
#include "tensors.h"

namespace mmvim {
namespace {

// The arguments of one direction, in the dtype that is computed in.
struct Direction {
  Tensor u, delta, A, B, C, D, delta_bias;
  bool softplus, reverse;

  Direction(const Tensor& u_, const Tensor& delta_, const Tensor& A_, const Tensor& B_,
            const Tensor& C_, const OptionalTensor& D_, const OptionalTensor& bias_, bool softplus,
            bool reverse)
      : softplus(softplus), reverse(reverse) {
    auto type = compute_type(u_);
    u = as(u_, type), delta = as(delta_, type), B = as(B_, type), C = as(C_, type);
    A = packed(as(A_, type)), D = packed(as(D_, type)), delta_bias = packed(as(bias_, type));
  }

  int64_t batch() const { return u.size(0); }
  int64_t channels() const { return u.size(1); }
  int64_t length() const { return u.size(2); }
  int64_t states() const { return A.size(1); }
  int64_t groups() const {
    return std::max(B.dim() == 4 ? B.size(1) : 1, C.dim() == 4 ? C.size(1) : 1);
  }
  int64_t saved() const { return length() > 0 ? (length() - 1) / kSegment : 0; }
  Tensor empty(at::IntArrayRef size) const { return fresh(size, u.options()); }
  Tensor new_checkpoints(bool save) const {
    return save ? empty({batch(), saved(), states(), channels()}) : empty({0});
  }

  template <class T> ScanArgs<T> args(const Tensor& z, double scale, Finish finish) const {
    ScanArgs<T> a{};
    a.batch = batch(), a.channels = channels(), a.length = length(), a.states = states();
    a.groups = groups();
    int64_t lanes = kernels<T>().lanes, blocks = (a.channels / a.groups + lanes - 1) / lanes;
    a.splits = splits(a.batch * a.groups, blocks, at::get_num_threads());
    a.u = sequence<const T>(u, reverse), a.delta = sequence<const T>(delta, reverse);
    a.z = sequence<const T>(z, reverse);
    a.B = matrix<T>(B, reverse), a.C = matrix<T>(C, reverse);
    a.A = data<const T>(A), a.D = data<const T>(D), a.delta_bias = data<const T>(delta_bias);
    a.softplus = softplus, a.scale = T(scale), a.finish = finish;
    return a;
  }
};

template <class T> void run(const ScanArgs<T>& args, bool backward) {
  const Kernels<T>& table = kernels<T>();
  int64_t bytes = table.scan_scratch(args, backward);
  auto kernel = backward ? table.scan_backward : table.scan_forward;
  parallel_for(args.batch * args.groups * args.splits, [&](int64_t begin, int64_t end) {
    kernel(args, begin, end, scratch(bytes));
  });
}

// `checkpoints` are written unless undefined; `state` is where the scan starts, zeros if undefined.
inline void forward(const Direction& d, const Tensor& z, double scale, Finish finish,
                    const Tensor& out, const Tensor& last_state, const Tensor& checkpoints,
                    const Tensor& state = {}) {
  with_type(d.u.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    auto args = d.args<T>(z, scale, finish);
    args.out = sequence<T>(out, d.reverse);
    args.first_state = data<const T>(state);
    args.last_state = data<T>(last_state);
    args.checkpoints = data<T>(checkpoints);
    run(args, false);
  });
}

// What the backward pass of a segment in the middle of a sequence has besides.
struct Middle {
  Tensor state;              // where the segment starts, (batch, channels, states)
  Tensor grad_state;         // after the segment, then before it; the same shape
  Tensor out;                // gets the gated output where the gate is applied, unless undefined
};

// Gradients of one direction. Those of B and C are laid out (batch, groups, length, states).
struct Gradients {
  Tensor u, delta, A, B, C, D, delta_bias;

  explicit Gradients(const Direction& d, const Tensor& grad_u = {}) {
    u = grad_u.defined() ? grad_u : fresh_like(d.u), delta = fresh_like(d.delta);
    A = d.empty({d.batch(), d.channels(), d.states()});
    if (d.D.defined()) D = d.empty({d.batch(), d.channels()});
    if (d.delta_bias.defined()) delta_bias = d.empty({d.batch(), d.channels()});
  }

  void run(const Direction& d, const Tensor& z, double scale, Finish finish, const Tensor& grad_out,
           const Tensor& grad_last_state, const Tensor& checkpoints, const Tensor& grad_z,
           const Middle& middle = {}) {
    TORCH_CHECK(checkpoints.dim() == 4, "backward needs a forward that was told to save");
    if (d.u.numel() == 0) return nothing(d);
    with_type(d.u.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      auto args = d.args<T>(z, scale, finish);
      auto room = [&](const Tensor& x) {
        if (x.dim() == 2) return at::empty_like(A);
        return d.empty({args.splits, args.batch, args.groups, args.length, args.states});
      };
      B = room(d.B), C = room(d.C);
      args.checkpoints = data<T>(checkpoints);
      args.grad_out = sequence<const T>(grad_out, d.reverse);
      args.grad_last_state = data<const T>(grad_last_state);
      args.first_state = data<const T>(middle.state);
      args.grad_first_state = data<T>(middle.grad_state);
      args.out = sequence<T>(middle.out, d.reverse);
      args.grad_u = sequence<T>(u, d.reverse), args.grad_delta = sequence<T>(delta, d.reverse);
      args.grad_z = sequence<T>(grad_z, d.reverse);
      args.grad_A = data<T>(A), args.grad_D = data<T>(D);
      args.grad_delta_bias = data<T>(delta_bias);
      args.grad_time = d.reverse ? -args.states : args.states;
      int64_t start = d.reverse ? (args.length - 1) * args.states : 0;
      args.grad_B = data<T>(B) + (args.B.varying ? start : 0);
      args.grad_C = data<T>(C) + (args.C.varying ? start : 0);
      mmvim::run(args, true);
    });
    A = A.sum(0);
    if (D.defined()) D = D.sum(0);
    if (delta_bias.defined()) delta_bias = delta_bias.sum(0);
    B = matrix_gradient(B, d.B), C = matrix_gradient(C, d.C);
  }

  // Of an empty input.
  void nothing(const Direction& d) {
    A = at::zeros_like(d.A), B = at::zeros_like(d.B), C = at::zeros_like(d.C);
    if (D.defined()) D = at::zeros_like(d.D);
    if (delta_bias.defined()) delta_bias = at::zeros_like(d.delta_bias);
  }

  // Sum what the tasks have left, in the dimensions of the argument.
  static Tensor matrix_gradient(const Tensor& sums, const Tensor& argument) {
    if (argument.dim() == 2) return sums.sum(0);
    Tensor whole = sums.size(0) == 1 ? sums[0] : sums.sum(0);      // (B, G, L, N)
    whole = whole.transpose(-1, -2);                               // (B, G, N, L)
    return argument.dim() == 3 ? whole.squeeze(1) : whole;
  }
};

inline Tensor result(const Tensor& x, const Tensor& like) { return x.to(like.scalar_type()); }
inline Tensor result(const Tensor& x, const OptionalTensor& like, const Tensor& u) {
  return like.has_value() ? x.to(like->scalar_type()) : at::empty({0}, u.options());
}

}  // namespace
}  // namespace mmvim
