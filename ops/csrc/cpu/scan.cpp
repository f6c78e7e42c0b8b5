// The scan operators: one direction, and two that share a gate. Their schemas are those of
// mmvim_ops/backends/schemas.py.
#include <torch/library.h>

#include "scan_tensors.h"

namespace mmvim {
namespace {

std::tuple<Tensor, Tensor, Tensor> scan(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& delta_bias,
    bool delta_softplus, bool reverse, bool save) {
  Direction d(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse);
  Tensor out = fresh_like(d.u), checkpoints = d.new_checkpoints(save), kept;
  if (save) kept = checkpoints;
  Tensor last_state = d.empty({d.batch(), d.channels(), d.states()});
  if (u.numel() == 0) {
    last_state.zero_();
  } else {
    forward(d, as(z, d.u.scalar_type()), 1., Finish::kGate, out, last_state, kept);
  }
  return {result(out, u), last_state, checkpoints};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scan_backward(
    const Tensor& grad_out, const OptionalTensor& grad_last_state, const Tensor& u,
    const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D,
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

// A segment of a longer sequence: `state` is where it starts and then where it ends; `out` is written
// or, with `accumulate`, added to before the gate.
void scan_segment(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                  const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                  const OptionalTensor& delta_bias, Tensor state, Tensor out, bool delta_softplus,
                  bool reverse, bool accumulate, double scale) {
  Direction d(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse);
  if (u.numel() == 0) return;
  forward(d, as(z, d.u.scalar_type()), scale, accumulate ? Finish::kAddAndGate : Finish::kGate, out,
          state, {}, state);
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
    forward(first, gate, scale, Finish::kKeep, out, none, save ? checkpoints : none);
    forward(second, gate, scale, Finish::kAddAndGate, out, none, save ? checkpoints_b : none);
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
  m.def("cpp_instruction_set(str name='') -> str", choose);
  m.def("cpp_instruction_sets() -> str[]", instruction_sets);
}

TORCH_LIBRARY_IMPL(mmvim_ops, CPU, m) {
  m.impl("cpp_scan", scan);
  m.impl("cpp_scan_backward", scan_backward);
  m.impl("cpp_scan_segment", scan_segment);
  m.impl("cpp_bidirectional_scan", bidirectional_scan);
  m.impl("cpp_bidirectional_scan_backward", bidirectional_scan_backward);
}

}  // namespace
}  // namespace mmvim
