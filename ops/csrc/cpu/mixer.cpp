// The whole token mixer: projections, convolutions, scans and gate, a stretch of tokens at a time.
// What lies between the projections stays in the cache and never exists for a whole sequence. The
// scans' states are handed on from stretch to stretch.
//
// Forward keeps the states in which stretches start and the scan's checkpoints inside of them.
// Backward goes through the stretches against each scan's order, computes a stretch's tensors again
// and hands the gradient of the state on.
#include <torch/library.h>

#include <cmath>

#include "conv_tensors.h"
#include "scan_tensors.h"

namespace mmvim {
namespace {

// Tokens at a time, about: enough for matrix products at full speed, few enough for the cache.
constexpr int64_t kTokens = 1024;

// What is stored for backward.
enum Save { kNothing = 0, kProjection = 1, kStatesOnly = 2 };

// x @ weightᵀ + bias of contiguous (batch, length, in) tokens: (batch, length, out). In float32 it
// is a 1 x 1 convolution: oneDNN uses the whole vector width, torch's BLAS half of it on AMD.
// With few channels torch would not ask oneDNN.
bool as_convolution(const Tensor& x, const Tensor& weight) {
  return x.scalar_type() == at::kFloat && x.numel() > 0 && weight.size(0) >= 32
      && weight.size(1) >= 32 && at::globalContext().userEnabledMkldnn() && at::hasMKLDNN();
}
Tensor image(const Tensor& tokens) { return tokens.transpose(1, 2).unsqueeze(2); }
Tensor filters(const Tensor& weight) { return weight.unsqueeze(2).unsqueeze(3); }
Tensor product(const Tensor& x, const Tensor& weight, const Tensor& bias = {}) {
  std::optional<Tensor> b;
  if (bias.defined()) b = bias;
  if (!as_convolution(x, weight)) return at::linear(x, weight, b);
  return at::conv2d(image(x), filters(weight), b).squeeze(2).transpose(1, 2).contiguous();
}

// The gradient of x in y = product(x, weight), as its shape tells.
Tensor through_product(const Tensor& grad_y, const Tensor& weight) {
  if (!as_convolution(grad_y, weight)) return at::matmul(grad_y, weight);
  // x takes no part: only its shape and strides are looked at.
  Tensor x = at::empty({grad_y.size(0), grad_y.size(1), weight.size(1)}, grad_y.options());
  auto grad = std::get<0>(at::convolution_backward(
      image(grad_y), image(x), filters(weight), at::OptionalIntArrayRef{}, {1, 1}, {0, 0}, {1, 1}, false,
      {0, 0}, 1, {true, false, false}));
  return grad.squeeze(2).transpose(1, 2).contiguous();
}

// The factor of each token in its root mean square norm: (batch, length, 1).
Tensor norm_scale(const Tensor& x, double eps) {
  return at::linalg_vector_norm(x, 2, at::IntArrayRef{-1}, true).square_()
      .div_(double(x.size(-1))).add_(eps).rsqrt_();
}

// Add the gradient of weight in y = product(x, weight) to `sum`.
void add_weight_gradient(const Tensor& sum, const Tensor& grad_y, const Tensor& x) {
  if (as_convolution(x, sum)) {
    auto grad = std::get<1>(at::convolution_backward(
        image(grad_y), image(x), filters(sum), at::OptionalIntArrayRef{}, {1, 1}, {0, 0}, {1, 1},
        false, {0, 0}, 1, {false, true, false}));
    sum.add_(grad.view(sum.sizes()));
  } else {
    sum.addmm_(grad_y.reshape({-1, grad_y.size(2)}).t(), x.reshape({-1, x.size(2)}));
  }
}

// Tokens [begin, end) of the sequence.
struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
  Tensor of(const Tensor& x) const { return x.slice(1, begin, end); }
};

// The parameters of one direction, then their gradients.
struct Branch {
  Tensor conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D;
  bool reverse = false, conv_reverse = false;

  int64_t taps() const { return conv_weight.size(-1); }
  int64_t rank() const { return dt_proj.size(1); }
  int64_t states() const { return A.size(1); }
  Branch zeros() const {
    auto zero = [](const Tensor& x) { return x.defined() ? at::zeros_like(x) : x; };
    return {zero(conv_weight), zero(conv_bias), zero(x_proj), zero(dt_proj), zero(dt_bias), zero(A),
            zero(D)};
  }
};

// What a direction computes of a stretch before its scan. The convolution sees some tokens more than
// the stretch has; `own` says where the stretch begins among those that were `seen`.
struct Selection {
  Range seen;
  int64_t own;
  Tensor x, u_seen, u, selected, delta;       // (b, l, E), selected (b, l, R + 2 N)

  Selection(const Branch& p, const Tensor& x_whole, Range here, int64_t length) {
    seen = here;
    if (p.conv_reverse) seen.end = std::min(here.end + p.taps() - 1, length);
    else seen.begin = std::max<int64_t>(here.begin - p.taps() + 1, 0);
    own = here.begin - seen.begin;
    x = seen.of(x_whole);
    u_seen = fresh({x.size(0), x.size(1), x.size(2)}, x.options());
    conv_forward(x.transpose(1, 2), p.conv_weight, p.conv_bias, true, p.conv_reverse,
                 u_seen.transpose(1, 2));
    u = u_seen.slice(1, own, own + here.size()).contiguous();
    selected = product(u, p.x_proj);
    delta = product(dt(p), p.dt_proj);
  }
  Tensor dt(const Branch& p) const { return selected.slice(2, 0, p.rank()).contiguous(); }
  Direction direction(const Branch& p) const {
    auto part = [&](int64_t i) {
      int64_t begin = p.rank() + i * p.states();
      return selected.slice(2, begin, begin + p.states()).transpose(1, 2);      // (b, N, l)
    };
    return Direction(u.transpose(1, 2), delta.transpose(1, 2), p.A, part(0), part(1), given(p.D),
                     given(p.dt_bias), true, p.reverse);
  }
  static OptionalTensor given(const Tensor& x) {
    return x.defined() ? OptionalTensor(x) : std::nullopt;
  }
};

struct Mixer {
  Tensor tokens, norm_weight, in_weight, in_bias, out_weight, out_bias;
  std::vector<Branch> branches;               // in the order in which `out` is added up
  double scale, norm_eps;
  int64_t batch, length, inner, together;     // images that are worked through together
  std::vector<Range> stretches;

  Mixer(const Tensor& tokens_, const OptionalTensor& norm_weight, const Tensor& in_weight,
        const OptionalTensor& in_bias, const Tensor& out_weight, const OptionalTensor& out_bias,
        std::vector<Branch> branches_, double scale, double norm_eps)
      : tokens(tokens_.contiguous()), norm_weight(norm_weight.value_or(Tensor())),
        in_weight(in_weight), in_bias(in_bias.value_or(Tensor())), out_weight(out_weight),
        out_bias(out_bias.value_or(Tensor())), branches(std::move(branches_)), scale(scale),
        norm_eps(norm_eps), batch(tokens_.size(0)),
        length(tokens_.size(1)), inner(in_weight.size(0) / 2) {
    std::reverse(branches.begin(), branches.end());
    together = kTokens / std::max<int64_t>(length, 1);
    together = std::clamp<int64_t>(together, 1, std::max<int64_t>(batch, 1));
    int64_t count = count_stretches(length);
    for (int64_t i = 0; i < count; i++)
      stretches.push_back({length * i / count, length * (i + 1) / count});
  }

  // Rows of inner * states numbers that are saved of one image and direction: for each stretch the
  // state it starts in and its checkpoints, as many as the longest stretch has.
  static int64_t rows(int64_t length) {
    int64_t stretches = count_stretches(length);
    return stretches * (1 + checkpoints((length + stretches - 1) / stretches));
  }
  static int64_t count_stretches(int64_t length) {
    return std::max<int64_t>(1, (length + kTokens / 2) / kTokens);
  }
  static int64_t checkpoints(int64_t length) { return std::max<int64_t>(length - 1, 0) / kSegment; }

  // Where a stretch of these images starts, (b, E, N), and its checkpoints, (b, saved, N, E).
  std::pair<Tensor, Tensor> states(const Tensor& all, const Branch& p, int64_t first, int64_t b,
                                   size_t stretch) const {
    int64_t per_stretch = rows(length) / int64_t(stretches.size());
    int64_t begin = first * rows(length) + b * int64_t(stretch) * per_stretch;
    int64_t count = checkpoints(stretches[stretch].size());
    return {all.slice(0, begin, begin + b).view({b, inner, p.states()}),
            all.slice(0, begin + b, begin + b + b * count).view({b, count, p.states(), inner})};
  }

  // Stretches in the order of a scan, or against it.
  std::vector<size_t> order(const Branch& p, bool backward) const {
    std::vector<size_t> indices(stretches.size());
    std::iota(indices.begin(), indices.end(), 0);
    if (p.reverse != backward) std::reverse(indices.begin(), indices.end());
    return indices;
  }

  // The tokens of in_proj, (b, l, C).
  Tensor normed(const Tensor& x) const {
    if (!norm_weight.defined()) return x;
    Tensor y = fresh(x.sizes(), x.options());
    at::mul_out(y, x, norm_scale(x, norm_eps));
    return y.mul_(norm_weight);
  }

  // The gradient of x from that of normed(x), which is overwritten; adds to that of norm_weight.
  Tensor through_norm(const Tensor& x, const Tensor& grad, const Tensor& grad_weight) const {
    if (!norm_weight.defined()) return grad;
    Tensor factor = norm_scale(x, norm_eps), unit = x * factor;
    grad_weight.add_((grad * unit).sum(at::IntArrayRef{0, 1}));
    grad.mul_(norm_weight);
    Tensor along = at::linalg_vecdot(grad, unit).unsqueeze(-1).div_(double(x.size(-1)));
    return grad.addcmul_(unit, along, -1).mul_(factor);
  }

  // Rows [begin, end) of in_proj, of tokens before their norm.
  Tensor project(const Tensor& x, int64_t begin, int64_t end) const {
    return product(normed(x), in_weight.slice(0, begin, end),
                  in_bias.defined() ? in_bias.slice(0, begin, end) : in_bias);
  }

  Finish finish(size_t branch) const {
    return branches.size() == 1 ? Finish::kGate : branch == 0 ? Finish::kKeep : Finish::kAddAndGate;
  }

  // Returns the output, (batch, length, C'), and what backward needs: in_proj's output and the states
  // of each branch, in the order of `branches`; empty where it is not to be saved.
  std::vector<Tensor> forward(int64_t save) const {
    Tensor xz = save == kProjection ? project(tokens, 0, 2 * inner)
                                    : at::empty({0}, tokens.options());
    std::vector<Tensor> results{fresh({batch, length, out_weight.size(0)}, tokens.options()), xz};
    for (const Branch& p : branches)
      results.push_back(at::empty({save ? batch * rows(length) : 0, inner * p.states()},
                                  tokens.options()));
    if (tokens.numel() == 0) return results;
    Tensor y_all = fresh({together, length, inner}, tokens.options());
    for (int64_t first = 0; first < batch; first += together) {
      int64_t b = std::min(together, batch - first);
      Tensor images = tokens.slice(0, first, first + b), y = y_all.slice(0, 0, b), x;
      bool projected = save == kProjection;
      if (projected) x = xz.slice(0, first, first + b).slice(2, 0, inner);
      else x = project_x(images);
      for (size_t i = 0; i < branches.size(); i++) {
        const Branch& p = branches[i];
        bool last = i + 1 == branches.size();
        Tensor state = at::zeros({b, inner, p.states()}, tokens.options());
        for (size_t s : order(p, false)) {
          Range here = stretches[s];
          Tensor z, checkpoints;
          if (last) z = projected ? here.of(xz.slice(0, first, first + b).slice(2, inner))
                                  : project(here.of(images), inner, 2 * inner);
          if (save) {
            auto kept = states(results[2 + i], p, first, b, s);
            kept.first.copy_(state);
            checkpoints = kept.second;
          }
          Selection chosen(p, x, here, length);
          Tensor y_here = here.of(y);
          mmvim::forward(chosen.direction(p), last ? z.transpose(1, 2) : z, last ? scale : 1.,
                         finish(i), y_here.transpose(1, 2), state, checkpoints, state);
          if (last) here.of(results[0].slice(0, first, first + b))
              .copy_(product(y_here.contiguous(), out_weight, out_bias));
        }
      }
    }
    return results;
  }

  Tensor project_x(const Tensor& images) const {
    if (stretches.size() == 1) return project(images, 0, inner);
    Tensor x = fresh({images.size(0), length, inner}, images.options());
    for (Range here : stretches) here.of(x).copy_(project(here.of(images), 0, inner));
    return x;
  }

  // Gradients of the tokens, the projections and, in the order of `branches`, their parameters.
  std::vector<Tensor> backward(const Tensor& grad_out_, const Tensor& xz_,
                               const std::vector<Tensor>& saved_states) const {
    Tensor grad_out = grad_out_.contiguous(), grad_tokens = fresh_like(tokens);
    auto zeros = [](const Tensor& x) { return x.defined() ? at::zeros_like(x) : x; };
    Tensor grad_norm = zeros(norm_weight);
    Tensor grad_in = zeros(in_weight), grad_in_bias = zeros(in_bias);
    Tensor grad_out_weight = zeros(out_weight), grad_out_bias = zeros(out_bias);
    std::vector<Branch> grads;
    for (const Branch& p : branches) grads.push_back(p.zeros());
    for (int64_t first = 0; first < batch && tokens.numel() > 0; first += together) {
      int64_t b = std::min(together, batch - first);
      auto some = [&](const Tensor& x) { return x.slice(0, first, first + b); };
      Tensor images = some(tokens), grad_images = some(grad_out);
      Tensor xz = xz_.dim() == 3 ? some(xz_) : project(images, 0, 2 * inner);
      Tensor grad_y = through_product(grad_images, out_weight);        // (b, L, E)
      Tensor grad_xz = fresh({b, length, 2 * inner}, tokens.options());
      Tensor grad_x = grad_xz.slice(2, 0, inner), grad_z = grad_xz.slice(2, inner);
      grad_x.zero_();
      for (size_t i = 0; i < branches.size(); i++) {
        const Branch& p = branches[i];
        bool last = i + 1 == branches.size();
        Tensor grad_state = at::zeros({b, inner, p.states()}, tokens.options());
        for (size_t s : order(p, true)) {
          Range here = stretches[s];
          auto [start, checkpoints] = states(saved_states[i], p, first, b, s);
          Tensor y = last ? fresh({b, here.size(), inner}, tokens.options()) : Tensor();
          Middle middle{start, grad_state, last ? y.transpose(1, 2) : y};
          through_stretch(p, grads[i], here, xz, here.of(grad_y), checkpoints, grad_x,
                          here.of(grad_z), finish(i), middle);
          if (last) add_weight_gradient(grad_out_weight, here.of(grad_images).contiguous(), y);
        }
      }
      add_weight_gradient(grad_in, grad_xz, normed(images));
      some(grad_tokens).copy_(through_norm(images, through_product(grad_xz, in_weight), grad_norm));
      if (in_bias.defined()) grad_in_bias.add_(grad_xz.sum(at::IntArrayRef{0, 1}));
    }
    if (out_bias.defined()) grad_out_bias.add_(grad_out.sum(at::IntArrayRef{0, 1}));
    std::vector<Tensor> all{grad_tokens,  grad_norm,       grad_in,
                            grad_in_bias, grad_out_weight, grad_out_bias};
    for (const Branch& g : grads)
      for (const Tensor& x : {g.conv_weight, g.conv_bias, g.x_proj, g.dt_proj, g.dt_bias, g.A, g.D})
        all.push_back(x);
    for (Tensor& x : all)
      if (!x.defined()) x = at::empty({0}, tokens.options());
    return all;
  }

  // One stretch of one direction, backward: adds to the gradients of its parameters and of x.
  void through_stretch(const Branch& p, Branch& grad, Range here, const Tensor& xz,
                       const Tensor& grad_y, const Tensor& checkpoints, const Tensor& grad_x,
                       const Tensor& grad_z, Finish finish, const Middle& middle) const {
    Selection chosen(p, xz.slice(2, 0, inner), here, length);
    Direction d = chosen.direction(p);
    Tensor grad_seen = fresh(chosen.u_seen.sizes(), xz.options());
    Tensor grad_u = grad_seen.slice(1, chosen.own, chosen.own + here.size());
    grad_seen.slice(1, 0, chosen.own).zero_();
    grad_seen.slice(1, chosen.own + here.size()).zero_();
    Gradients g(d, grad_u.transpose(1, 2));
    g.run(d, here.of(xz).slice(2, inner).transpose(1, 2), scale, finish, grad_y.transpose(1, 2),
          middle.grad_state, checkpoints, grad_z.transpose(1, 2), middle);

    Tensor grad_delta = g.delta.transpose(1, 2);                              // (b, l, E)
    Tensor grad_selected = at::cat({at::matmul(grad_delta, p.dt_proj), g.B.transpose(1, 2),
                                    g.C.transpose(1, 2)}, 2);                 // (b, l, R + 2 N)
    // Several images come as one stretch each, and one image is contiguous: always a view.
    grad_u.view({-1, inner}).addmm_(grad_selected.view({-1, grad_selected.size(2)}), p.x_proj);
    add_weight_gradient(grad.dt_proj, grad_delta, chosen.dt(p));
    add_weight_gradient(grad.x_proj, grad_selected, chosen.u);
    Tensor grad_weight = at::zeros({grad_u.size(0), inner, p.taps()}, xz.options()), grad_bias;
    if (p.conv_bias.defined()) grad_bias = at::zeros({grad_u.size(0), inner}, xz.options());
    conv_backward(grad_seen.transpose(1, 2), chosen.x.transpose(1, 2), p.conv_weight, p.conv_bias,
                  true, p.conv_reverse, true, chosen.seen.of(grad_x).transpose(1, 2), grad_weight,
                  grad_bias);
    grad.conv_weight.add_(grad_weight.sum(0));
    if (p.conv_bias.defined()) grad.conv_bias.add_(grad_bias.sum(0));
    grad.A.add_(g.A);
    if (p.D.defined()) grad.D.add_(g.D);
    grad.dt_bias.add_(g.delta_bias);
  }
};

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
  auto results = mixer(MMVIM_MIXER_GIVEN).forward(save);
  // `branches` begin with the second direction
  Tensor first = results.back(), second = at::empty({0, 0}, tokens.options());
  if (results.size() == 4) second = results[2];
  return {results[0], results[1], first, second};
}

std::vector<Tensor> mamba_mixer_backward(const Tensor& grad_out, MMVIM_MIXER_ARGUMENTS,
                                         const Tensor& xz, const Tensor& states,
                                         const Tensor& states_b) {
  Mixer m = mixer(MMVIM_MIXER_GIVEN);
  std::vector<Tensor> saved{states};
  if (m.branches.size() == 2) saved.insert(saved.begin(), states_b);
  auto all = m.backward(grad_out, xz, saved);
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
  m.impl("cpp_mamba_mixer_backward", mamba_mixer_backward);
}

}  // namespace
}  // namespace mmvim
