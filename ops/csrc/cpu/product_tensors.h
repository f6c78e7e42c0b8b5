// Running the kernel of matrix products on tensors.
#pragma once
#include "tensors.h"

namespace mmvim {
namespace {

// Rows that pass by all panels before the next ones do, so that they stay in the cache.
constexpr int64_t kRowsTogether = 1024;

// (batch, length, channels) as rows; a view, which the strides must allow.
inline Tensor rows_of(const Tensor& x) { return x.view({x.size(0) * x.size(1), x.size(2)}); }

// One of the strides is 1.
inline Tensor dense(const Tensor& x) {
  return x.stride(0) == 1 || x.stride(1) == 1 ? x : x.contiguous();
}

// y = x weightᵀ + bias of (rows, in) and (out, in); `dense` ones.
template <class T>
ProductArgs<T> product_args(const Tensor& x, const Tensor& weight, const Tensor& bias,
                            const Tensor& y) {
  ProductArgs<T> args{};
  args.rows = x.size(0), args.in = x.size(1), args.out = weight.size(0);
  args.x = data<const T>(x), args.x_row = x.stride(0), args.x_in = x.stride(1);
  args.weight = data<const T>(weight);
  args.weight_out = weight.stride(0), args.weight_in = weight.stride(1);
  args.bias = data<const T>(bias);
  args.y = data<T>(y), args.y_row = y.stride(0);
  // as many chunks as give all threads the same to do
  int64_t panels = kernels<T>().product_panels(args.out);
  args.chunks = splits(panels, std::max<int64_t>(args.rows / 16, 1), at::get_num_threads());
  args.chunks = std::max(args.chunks, (args.rows + kRowsTogether - 1) / kRowsTogether);
  return args;
}

template <class T> int64_t product_tasks(const ProductArgs<T>& args) {
  return args.rows > 0 ? kernels<T>().product_panels(args.out) * args.chunks : 0;
}

template <class T> void run_product(const ProductArgs<T>& args, int64_t begin, int64_t end) {
  const Kernels<T>& table = kernels<T>();
  table.product(args, begin, end, scratch(table.product_scratch(args.in)));
}

// y = x weightᵀ + bias, or y += x weightᵀ.
inline void product(const Tensor& x_, const Tensor& weight_, const Tensor& bias, const Tensor& y,
                    bool accumulate = false) {
  Tensor x = dense(x_), weight = dense(weight_);
  with_type(x.scalar_type(), [&](auto zero) {
    auto args = product_args<decltype(zero)>(x, weight, bias, y);
    args.accumulate = accumulate;
    parallel_for(product_tasks(args), [&](int64_t begin, int64_t end) {
      run_product(args, begin, end);
    });
  });
}

// The same of (batch, length, in) tokens.
inline Tensor product(const Tensor& x, const Tensor& weight, const Tensor& bias = {}) {
  Tensor y = fresh({x.size(0), x.size(1), weight.size(0)}, x.options());
  product(rows_of(x), weight, bias, rows_of(y));
  return y;
}

}  // namespace
}  // namespace mmvim
