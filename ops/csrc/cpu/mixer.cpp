// The whole token mixer: projections, convolutions, scans and gate, a stretch of tokens at a time.
// What lies between the projections stays in the cache and never exists for a whole sequence. The
// scans' states are handed on from stretch to stretch.
//
// Forward keeps the states in which stretches start and the scan's checkpoints inside of them.
#include <torch/library.h>

#include "mixer_backward.h"
#include "mixer_forward.h"

namespace mmvim {
namespace {

Branch branch(const Tensor& conv_weight, const OptionalTensor& conv_bias, const Tensor& x_proj,
              const Tensor& dt_proj, const Tensor& dt_bias, const Tensor& A,
              const OptionalTensor& D, bool reverse, bool conv_reverse) {
  return {packed(conv_weight), packed(conv_bias.value_or(Tensor())), packed(x_proj),
          packed(dt_proj),     packed(dt_bias),                      packed(A),
          packed(D.value_or(Tensor())), reverse, conv_reverse};
}

// The operators' arguments, as in mmvim_ops/backends/schemas.py. A second direction is there if its
// conv_weight is.
#define MMVIM_MIXER_ARGUMENTS                                                                      \
  const Tensor &tokens, const OptionalTensor &norm_weight, const Tensor &in_weight,                \
      const OptionalTensor &in_bias, const Tensor &out_weight, const OptionalTensor &out_bias,     \
      const Tensor &conv_weight, const OptionalTensor &conv_bias, const Tensor &x_proj,            \
      const Tensor &dt_proj, const Tensor &dt_bias, const Tensor &A, const OptionalTensor &D,      \
      const OptionalTensor &conv_weight_b, const OptionalTensor &conv_bias_b,                      \
      const OptionalTensor &x_proj_b, const OptionalTensor &dt_proj_b,                             \
      const OptionalTensor &dt_bias_b, const OptionalTensor &A_b, const OptionalTensor &D_b,       \
      at::ArrayRef<int64_t> reversed, double scale, double norm_eps

Mixer mixer(MMVIM_MIXER_ARGUMENTS) {
  std::vector<Branch> branches{branch(conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D,
                                      reversed[0], reversed[1])};
  if (conv_weight_b.has_value())
    branches.push_back(branch(*conv_weight_b, conv_bias_b, *x_proj_b, *dt_proj_b, *dt_bias_b, *A_b,
                              D_b, reversed[2], reversed[3]));
  return Mixer(tokens, norm_weight, packed(in_weight), in_bias, packed(out_weight), out_bias,
               std::move(branches), scale, norm_eps);
}
#define MMVIM_MIXER_GIVEN                                                                          \
  tokens, norm_weight, in_weight, in_bias, out_weight, out_bias, conv_weight, conv_bias, x_proj,   \
      dt_proj, dt_bias, A, D, conv_weight_b, conv_bias_b, x_proj_b, dt_proj_b, dt_bias_b, A_b,     \
      D_b, reversed, scale, norm_eps

std::tuple<Tensor, Tensor, Tensor, Tensor> mamba_mixer(MMVIM_MIXER_ARGUMENTS, int64_t save) {
  Mixer m = mixer(MMVIM_MIXER_GIVEN);
  auto empty = [&](at::IntArrayRef size) { return at::empty(size, tokens.options()); };
  Tensor out = fresh({m.batch, m.length, out_weight.size(0)}, tokens.options());
  Tensor xz = save == kProjection ? empty({m.batch, m.length, 2 * m.inner}) : empty({0});
  std::vector<Tensor> states;                 // in the order of m.branches
  for (const Branch& p : m.branches)
    states.push_back(empty({save ? m.batch * Mixer::rows(m.length) : 0, m.inner * p.states()}));
  if (tokens.numel() > 0)
    with_type(tokens.scalar_type(), [&](auto zero) {
      MixerForward<decltype(zero)>(m, out, xz, states).run();
    });
  return {out, xz, states.back(), states.size() == 2 ? states.front() : empty({0, 0})};
}

// For inference: tokens of any dtype but float64, all others float32; `dtype`, a half precision, is that
// of the result.
Tensor mamba_mixer_half(MMVIM_MIXER_ARGUMENTS, at::ScalarType dtype) {
  Mixer m = mixer(MMVIM_MIXER_GIVEN);
  Tensor out = fresh({m.batch, m.length, out_weight.size(0)}, tokens.options().dtype(dtype));
  std::vector<Tensor> states(m.branches.size(), at::empty({0}, tokens.options()));
  if (tokens.numel() > 0) MixerForward<float>(m, out, states[0], states).run();
  return out;
}

std::vector<Tensor> mamba_mixer_backward(const Tensor& grad_out, MMVIM_MIXER_ARGUMENTS,
                                         const Tensor& xz, const Tensor& states,
                                         const Tensor& states_b) {
  MixerBackward m(mixer(MMVIM_MIXER_GIVEN));
  std::vector<Tensor> saved{states};
  if (m.branches.size() == 2) saved.insert(saved.begin(), states_b);
  auto all = m.run(grad_out, xz, saved);
  if (m.branches.size() == 2) {
    std::rotate(all.begin() + 6, all.begin() + 13, all.end());
  } else {
    for (int i = 0; i < 7; i++) all.push_back(at::empty({0}, tokens.options()));
  }
  return all;
}

TORCH_LIBRARY_FRAGMENT(mmvim_ops, m) {
  m.def("cpp_mamba_mixer_tokens() -> int", [] { return kTokens; });
}

TORCH_LIBRARY_IMPL(mmvim_ops, CPU, m) {
  m.impl("cpp_mamba_mixer", mamba_mixer);
  m.impl("cpp_mamba_mixer_half", mamba_mixer_half);
  m.impl("cpp_mamba_mixer_backward", mamba_mixer_backward);
}

}  // namespace
}  // namespace mmvim
