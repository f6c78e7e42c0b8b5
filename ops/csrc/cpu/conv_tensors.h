// Running the kernels of the depthwise causal convolution on tensors.
#pragma once
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
  args.splits = splits(args.batch, (args.channels + lanes - 1) / lanes, at::get_num_threads());
  args.x = sequence<const T>(x, reverse);
  args.weight = data<const T>(weight), args.bias = data<const T>(bias);
  args.silu = silu;
  return args;
}

inline void conv_forward(const Tensor& x, const Tensor& weight, const Tensor& bias, bool silu,
                         bool reverse, const Tensor& out) {
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    auto args = conv_args<T>(x, weight, bias, silu, reverse);
    args.out = sequence<T>(out, reverse);
    parallel_for(args.batch * args.splits, [&](int64_t begin, int64_t end) {
      kernels<T>().conv_forward(args, begin, end);
    });
  });
}

// Gradients of the weight and bias are one for each element of the batch. That of x is written or,
// with `accumulate`, added to.
inline void conv_backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                          const Tensor& bias, bool silu, bool reverse, bool accumulate,
                          const Tensor& grad_x, const Tensor& grad_weight,
                          const Tensor& grad_bias) {
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    auto args = conv_args<T>(x, weight, bias, silu, reverse);
    args.accumulate = accumulate;
    args.grad_out = sequence<const T>(grad_out, reverse);
    args.grad_x = sequence<T>(grad_x, reverse);
    args.grad_weight = data<T>(grad_weight), args.grad_bias = data<T>(grad_bias);
    parallel_for(args.batch * args.splits, [&](int64_t begin, int64_t end) {
      kernels<T>().conv_backward(args, begin, end);
    });
  });
}

}  // namespace
}  // namespace mmvim
