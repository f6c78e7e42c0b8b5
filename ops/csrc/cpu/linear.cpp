// The operator of a linear layer, without gradients. Its schema is that of
// mmvim_ops/backends/schemas.py.
#include <torch/library.h>

#include "product_tensors.h"

namespace mmvim {
namespace {

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  TORCH_CHECK(x.dim() == 3 && weight.dim() == 2 && x.size(2) == weight.size(1)
                  && (!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0))),
              "linear: x, weight and bias must be (batch, length, in), (out, in) and (out), got ",
              x.sizes(), ", ", weight.sizes(), " and ", bias ? bias->sizes() : at::IntArrayRef());
  return product(x.contiguous(), weight, packed(bias.value_or(Tensor())));
}

TORCH_LIBRARY_IMPL(mmvim_ops, CPU, m) { m.impl("cpp_linear", linear); }

}  // namespace
}  // namespace mmvim
