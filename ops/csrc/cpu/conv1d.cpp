// The operators of the depthwise causal convolution. Their schemas are those of
// mmvim_ops/backends/schemas.py.
#include <torch/library.h>

#include "conv_tensors.h"

namespace mmvim {
namespace {

Tensor conv1d(const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias_, bool silu,
              bool reverse) {
  auto type = compute_type(x_);
  Tensor x = as(x_, type), weight = packed(as(weight_, type)), bias = packed(as(bias_, type));
  Tensor out = fresh_like(x);
  if (x.numel() > 0) conv_forward(x, weight, bias, silu, reverse, out);
  return out.to(x_.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> conv1d_backward(
    const Tensor& grad_out_, const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias_,
    bool silu, bool reverse) {
  auto type = compute_type(x_);
  Tensor x = as(x_, type), weight = packed(as(weight_, type)), bias = packed(as(bias_, type));
  Tensor grad_out = as(grad_out_, type), grad_x = fresh_like(x);
  Tensor grad_weight = at::zeros({x.size(0), x.size(1), weight.size(1)}, weight.options());
  Tensor grad_bias;
  if (bias.defined()) grad_bias = at::zeros({x.size(0), x.size(1)}, weight.options());
  if (x.numel() > 0)
    conv_backward(grad_out, x, weight, bias, silu, reverse, false, grad_x, grad_weight, grad_bias);
  grad_bias = bias.defined() ? grad_bias.sum(0).to(bias_->scalar_type())
                             : at::empty({0}, x_.options());
  return {grad_x.to(x_.scalar_type()), grad_weight.sum(0).to(weight_.scalar_type()), grad_bias};
}

TORCH_LIBRARY_IMPL(mmvim_ops, CPU, m) {
  m.impl("cpp_conv1d", conv1d);
  m.impl("cpp_conv1d_backward", conv1d_backward);
}

}  // namespace
}  // namespace mmvim
