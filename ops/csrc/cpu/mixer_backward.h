// The mixer, backward: through the stretches against each scan's order. A stretch's tensors are computed
// again, and the gradient of the state is handed on.
#pragma once
#include "conv_tensors.h"
#include "mixer.h"
#include "product_tensors.h"

namespace mmvim {
namespace {

// For a gradient: the product with the transpose.
inline Tensor through_product(const Tensor& grad_y, const Tensor& weight) {
  return product(grad_y, weight.t());
}

// Add the gradient of weight in y = product(x, weight) to `sum`.
inline void add_weight_gradient(const Tensor& sum, const Tensor& grad_y, const Tensor& x) {
  product(rows_of(grad_y).t(), rows_of(x).t(), {}, sum, true);
}

// The factor of each token in its root mean square norm: (batch, length, 1).
inline Tensor norm_scale(const Tensor& x, double eps) {
  return at::linalg_vector_norm(x, 2, at::IntArrayRef{-1}, true).square_()
      .div_(double(x.size(-1))).add_(eps).rsqrt_();
}

// What a direction computes of a stretch before its scan. The convolution sees some tokens more than
// the stretch has; `own` says where the stretch begins among those that were `seen`.
struct Selection {
  Range seen;
  int64_t own;
  Tensor x, u_seen, u, selected, delta;       // (b, l, E), selected (b, l, R + 2 N)

  Selection(const Branch& p, const Tensor& x_whole, Range here, int64_t length)
      : seen(p.seen(here, length)), own(here.begin - seen.begin), x(seen.of(x_whole)) {
    u_seen = fresh({x.size(0), x.size(1), x.size(2)}, x.options());
    conv_forward(x.transpose(1, 2), p.conv_weight, p.conv_bias, true, p.conv_reverse,
                 u_seen.transpose(1, 2));
    u = u_seen.slice(1, own, own + here.size());
    selected = product(u, p.x_proj);
    delta = product(dt(p), p.dt_proj);
  }
  Tensor dt(const Branch& p) const { return selected.slice(2, 0, p.rank()); }
};

struct MixerBackward : Mixer {
  explicit MixerBackward(Mixer m) : Mixer(std::move(m)) {}

  // The tokens of in_proj, (b, l, C).
  Tensor normed(const Tensor& x) const {
    if (!norm_weight.defined()) return x;
    Tensor y = fresh(x.sizes(), x.options());
    at::mul_out(y, x, norm_scale(x, norm_eps));
    return y.mul_(norm_weight);
  }

  // Rows [begin, end) of in_proj, of tokens before their norm.
  Tensor project(const Tensor& x, int64_t begin, int64_t end) const {
    Tensor bias = in_bias.defined() ? in_bias.slice(0, begin, end) : in_bias;
    return product(normed(x), in_weight.slice(0, begin, end), bias);
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

  // Gradients of the tokens, the projections and, in the order of `branches`, their parameters.
  std::vector<Tensor> run(const Tensor& grad_out_, const Tensor& xz_,
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
    Direction d = p.direction(chosen.u, chosen.delta, chosen.selected);
    Tensor grad_seen = fresh(chosen.u_seen.sizes(), xz.options());
    Tensor grad_u = grad_seen.slice(1, chosen.own, chosen.own + here.size());
    grad_seen.slice(1, 0, chosen.own).zero_();
    grad_seen.slice(1, chosen.own + here.size()).zero_();
    Gradients g(d, grad_u.transpose(1, 2));
    g.run(d, here.of(xz).slice(2, inner).transpose(1, 2), scale, finish, grad_y.transpose(1, 2),
          middle.grad_state, checkpoints, grad_z.transpose(1, 2), middle);

    Tensor grad_delta = g.delta.transpose(1, 2);                              // (b, l, E)
    Tensor grad_selected = fresh(chosen.selected.sizes(), xz.options());       // (b, l, R + 2 N)
    grad_selected.slice(2, p.rank()).copy_(at::cat({g.B, g.C}, 1).transpose(1, 2));
    product(rows_of(grad_delta), p.dt_proj.t(), {},
            rows_of(grad_selected).slice(1, 0, p.rank()));
    product(rows_of(grad_selected), p.x_proj.t(), {}, rows_of(grad_u), true);
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

}  // namespace
}  // namespace mmvim
