// The operators of the depthwise causal convolution.
#include <torch/library.h>

#include "tensors.h"

namespace mmvim {
namespace {

template <class T>
ConvArgs<T> conv_args(const Tensor& x, const Tensor& weight, const Tensor& bias, bool silu,
                      bool reverse) {
  ConvArgs<T> args{};
  args.batch = x.size(0), args.channels = x.size(1), args.length = x.size(2);
  args.width = weight.size(1);
  int64_t lanes = kernels<T>().lanes;
  args.splits = splits(args.batch, (args.channels + lanes - 1) / lanes);
  args.x = sequence<const T>(x, reverse);
  args.weight = data<const T>(weight), args.bias = data<const T>(bias);
  args.silu = silu;
  return args;
}

Tensor conv1d(const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias_, bool silu,
              bool reverse) {
  auto type = compute_type(x_);
  Tensor x = as(x_, type), weight = packed(as(weight_, type)), bias = packed(as(bias_, type));
  Tensor out = fresh_like(x);
  if (x.numel() > 0) {
    with_type(type, [&](auto zero) {
      using T = decltype(zero);
      auto args = conv_args<T>(x, weight, bias, silu, reverse);
      args.out = sequence<T>(out, reverse);
      at::parallel_for(0, args.batch * args.splits, 1, [&](int64_t begin, int64_t end) {
        kernels<T>().conv_forward(args, begin, end);
      });
    });
  }
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
  if (x.numel() > 0) {
    with_type(type, [&](auto zero) {
      using T = decltype(zero);
      auto args = conv_args<T>(x, weight, bias, silu, reverse);
      args.grad_out = sequence<const T>(grad_out, reverse);
      args.grad_x = sequence<T>(grad_x, reverse);
      args.grad_weight = data<T>(grad_weight), args.grad_bias = data<T>(grad_bias);
      at::parallel_for(0, args.batch * args.splits, 1, [&](int64_t begin, int64_t end) {
        kernels<T>().conv_backward(args, begin, end);
      });
    });
  }
  grad_bias = bias.defined() ? grad_bias.sum(0).to(bias_->scalar_type())
                             : at::empty({0}, x_.options());
  return {grad_x.to(x_.scalar_type()), grad_weight.sum(0).to(weight_.scalar_type()), grad_bias};
}

TORCH_LIBRARY_FRAGMENT(mmvim_ops, m) {
  m.def("cpp_conv1d(Tensor x, Tensor weight, Tensor? bias, bool silu, bool reverse) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def("cpp_conv1d_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor? bias, bool silu, "
        "bool reverse) -> (Tensor, Tensor, Tensor)", {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(mmvim_ops, CPU, m) {
  m.impl("cpp_conv1d", conv1d);
  m.impl("cpp_conv1d_backward", conv1d_backward);
}

}  // namespace
}  // namespace mmvim
