// The scan operators: one direction, and two that share a gate.
#include <torch/library.h>

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
  int64_t saved() const { return length() > 0 ? (length() - 1) / kChunk : 0; }
  Tensor empty(at::IntArrayRef size) const { return fresh(size, u.options()); }
  Tensor new_checkpoints(bool save) const {
    return save ? empty({batch(), saved(), states(), channels()}) : empty({0});
  }

  template <class T> ScanArgs<T> args(const Tensor& z, double scale, Finish finish) const {
    ScanArgs<T> a{};
    a.batch = batch(), a.channels = channels(), a.length = length(), a.states = states();
    a.groups = groups();
    int64_t lanes = kernels<T>().lanes, blocks = (a.channels / a.groups + lanes - 1) / lanes;
    a.splits = splits(a.batch * a.groups, blocks);
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
  at::parallel_for(0, args.batch * args.groups * args.splits, 1, [&](int64_t begin, int64_t end) {
    kernel(args, begin, end, scratch(bytes));
  });
}

void forward(const Direction& d, const Tensor& z, double scale, Finish finish, const Tensor& out,
             const Tensor& last_state, const Tensor& checkpoints, bool save) {
  with_type(d.u.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    auto args = d.args<T>(z, scale, finish);
    args.out = sequence<T>(out, d.reverse);
    args.last_state = data<T>(last_state);
    args.checkpoints = save ? data<T>(checkpoints) : nullptr;
    run(args, false);
  });
}

// Gradients of one direction. Those of B and C are laid out (batch, groups, length, states).
struct Gradients {
  Tensor u, delta, A, B, C, D, delta_bias;

  explicit Gradients(const Direction& d) {
    u = fresh_like(d.u), delta = fresh_like(d.delta);
    A = d.empty({d.batch(), d.channels(), d.states()});
    if (d.D.defined()) D = d.empty({d.batch(), d.channels()});
    if (d.delta_bias.defined()) delta_bias = d.empty({d.batch(), d.channels()});
  }

  void run(const Direction& d, const Tensor& z, double scale, Finish finish, const Tensor& grad_out,
           const Tensor& grad_last_state, const Tensor& checkpoints, const Tensor& grad_z) {
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

Tensor result(const Tensor& x, const Tensor& like) { return x.to(like.scalar_type()); }
Tensor result(const Tensor& x, const OptionalTensor& like, const Tensor& u) {
  return like.has_value() ? x.to(like->scalar_type()) : at::empty({0}, u.options());
}

std::tuple<Tensor, Tensor, Tensor> scan(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& delta_bias,
    bool delta_softplus, bool reverse, bool save) {
  Direction d(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse);
  Tensor out = fresh_like(d.u), checkpoints = d.new_checkpoints(save);
  Tensor last_state = d.empty({d.batch(), d.channels(), d.states()});
  if (u.numel() == 0) {
    last_state.zero_();
  } else {
    forward(d, as(z, d.u.scalar_type()), 1., Finish::kGate, out, last_state, checkpoints, save);
  }
  return {result(out, u), last_state, checkpoints};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scan_backward(
    const Tensor& grad_out, const Tensor& grad_last_state, const Tensor& u, const Tensor& delta,
    const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D,
    const OptionalTensor& z, const OptionalTensor& delta_bias, const Tensor& checkpoints,
    bool delta_softplus, bool reverse) {
  Direction d(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse);
  auto type = d.u.scalar_type();
  Tensor gate = as(z, type), grad_z = gate.defined() ? fresh_like(gate) : Tensor();
  Gradients g(d);
  g.run(d, gate, 1., Finish::kGate, as(grad_out, type), packed(as(grad_last_state, type)),
        checkpoints, grad_z);
  return {result(g.u, u), result(g.delta, delta), result(g.A, A), result(g.B, B), result(g.C, C),
          result(g.D, D, u), result(grad_z, z, u), result(g.delta_bias, delta_bias, u)};
}

// A block of a longer sequence: `state` is where it starts and then where it ends; `out` is written
// or, with `accumulate`, added to before the gate.
void scan_block(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                const OptionalTensor& delta_bias, Tensor state, Tensor out, bool delta_softplus,
                bool reverse, bool accumulate, double scale) {
  Direction d(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse);
  if (u.numel() == 0) return;
  Tensor gate = as(z, d.u.scalar_type());
  with_type(d.u.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    auto args = d.args<T>(gate, scale, accumulate ? Finish::kAddAndGate : Finish::kGate);
    args.out = sequence<T>(out, reverse);
    args.first_state = args.last_state = data<T>(state);
    run(args, false);
  });
}

// Two directions whose sum is gated: out = (y + y_b) silu(z) scale. The first leaves y in `out`,
// the second adds its own and gates.
std::tuple<Tensor, Tensor, Tensor> bidirectional_scan(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const OptionalTensor& D, const OptionalTensor& delta_bias, const Tensor& u_b,
    const Tensor& delta_b, const Tensor& A_b, const Tensor& B_b, const Tensor& C_b,
    const OptionalTensor& D_b, const OptionalTensor& delta_bias_b, const OptionalTensor& z,
    bool delta_softplus, double scale, bool save) {
  Direction first(u, delta, A, B, C, D, delta_bias, delta_softplus, false);
  Direction second(u_b, delta_b, A_b, B_b, C_b, D_b, delta_bias_b, delta_softplus, true);
  Tensor out = fresh_like(first.u), gate = as(z, first.u.scalar_type()), none;
  Tensor checkpoints = first.new_checkpoints(save), checkpoints_b = second.new_checkpoints(save);
  if (u.numel() > 0) {
    forward(first, gate, scale, Finish::kKeep, out, none, checkpoints, save);
    forward(second, gate, scale, Finish::kAddAndGate, out, none, checkpoints_b, save);
  }
  return {result(out, u), checkpoints, checkpoints_b};
}

std::vector<Tensor> bidirectional_scan_backward(
    const Tensor& grad_out_, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
    const Tensor& C, const OptionalTensor& D, const OptionalTensor& delta_bias, const Tensor& u_b,
    const Tensor& delta_b, const Tensor& A_b, const Tensor& B_b, const Tensor& C_b,
    const OptionalTensor& D_b, const OptionalTensor& delta_bias_b, const OptionalTensor& z,
    const Tensor& checkpoints, const Tensor& checkpoints_b, bool delta_softplus, double scale) {
  Direction first(u, delta, A, B, C, D, delta_bias, delta_softplus, false);
  Direction second(u_b, delta_b, A_b, B_b, C_b, D_b, delta_bias_b, delta_softplus, true);
  auto type = first.u.scalar_type();
  Tensor grad_out = as(grad_out_, type), gate = as(z, type), none;
  Tensor grad_z = gate.defined() ? fresh_like(gate) : none;
  Gradients g(first), g_b(second);
  g.run(first, gate, scale, Finish::kKeep, grad_out, none, checkpoints, grad_z);
  g_b.run(second, gate, scale, Finish::kAddAndGate, grad_out, none, checkpoints_b, grad_z);
  return {result(g.u, u), result(g.delta, delta), result(g.A, A), result(g.B, B), result(g.C, C),
          result(g.D, D, u), result(g.delta_bias, delta_bias, u), result(g_b.u, u_b),
          result(g_b.delta, delta_b), result(g_b.A, A_b), result(g_b.B, B_b), result(g_b.C, C_b),
          result(g_b.D, D_b, u), result(g_b.delta_bias, delta_bias_b, u), result(grad_z, z, u)};
}

std::string choose(std::string name) {
  TORCH_CHECK(name.empty() || choose_instruction_set(name), "instruction set must be one of ",
              instruction_sets(), ", got ", name);
  return instruction_set().name;
}

TORCH_LIBRARY_FRAGMENT(mmvim_ops, m) {
  m.def("cpp_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
        "Tensor? delta_bias, bool delta_softplus, bool reverse, bool save) -> "
        "(Tensor, Tensor, Tensor)", {at::Tag::pt2_compliant_tag});
  m.def("cpp_scan_backward(Tensor grad_out, Tensor grad_last_state, Tensor u, Tensor delta, "
        "Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
        "Tensor checkpoints, bool delta_softplus, bool reverse) -> (Tensor, Tensor, Tensor, "
        "Tensor, Tensor, Tensor, Tensor, Tensor)", {at::Tag::pt2_compliant_tag});
  m.def("cpp_scan_block(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
        "Tensor? delta_bias, Tensor(a!) state, Tensor(b!) out, bool delta_softplus, bool reverse, "
        "bool accumulate, float scale) -> ()", {at::Tag::pt2_compliant_tag});
  const std::string directions = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, "
        "Tensor? delta_bias, Tensor u_b, Tensor delta_b, Tensor A_b, Tensor B_b, Tensor C_b, "
        "Tensor? D_b, Tensor? delta_bias_b, Tensor? z, ";
  m.def(("cpp_bidirectional_scan(" + directions + "bool delta_softplus, float scale, bool save)"
         " -> (Tensor, Tensor, Tensor)").c_str(), {at::Tag::pt2_compliant_tag});
  m.def(("cpp_bidirectional_scan_backward(Tensor grad_out, " + directions + "Tensor checkpoints, "
         "Tensor checkpoints_b, bool delta_softplus, float scale) -> Tensor[]").c_str(),
        {at::Tag::pt2_compliant_tag});
  m.def("cpp_instruction_set(str name='') -> str", choose);
  m.def("cpp_instruction_sets() -> str[]", instruction_sets);
}

TORCH_LIBRARY_IMPL(mmvim_ops, CPU, m) {
  m.impl("cpp_scan", scan);
  m.impl("cpp_scan_backward", scan_backward);
  m.impl("cpp_scan_block", scan_block);
  m.impl("cpp_bidirectional_scan", bidirectional_scan);
  m.impl("cpp_bidirectional_scan_backward", bidirectional_scan_backward);
}

}  // namespace
}  // namespace mmvim
