// From tensors to what the kernels take.
#pragma once
#include <ATen/ATen.h>

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <optional>
#include <string>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "dispatch.h"
#include "parallel.h"
#include "work.h"

namespace mmvim {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// float64 is computed in float64, everything else in float32.
inline at::ScalarType compute_type(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Call f with a value of the C++ type that `type` stands for.
template <class Function> void with_type(at::ScalarType type, const Function& f) {
  if (type == at::kDouble) f(double()); else f(float());
}

// A tensor in this dtype; undefined stays undefined.
inline Tensor as(const Tensor& x, at::ScalarType type) { return x.defined() ? x.to(type) : x; }
inline Tensor as(const OptionalTensor& x, at::ScalarType type) {
  return x.has_value() ? as(*x, type) : Tensor();
}
inline Tensor packed(const Tensor& x) { return x.defined() ? x.contiguous() : x; }

template <class T> T* data(const Tensor& x) {
  using Value = std::remove_const_t<T>;
  return x.defined() ? const_cast<Value*>(x.const_data_ptr<Value>()) : nullptr;
}

// Undefined gives null data; `reverse` walks from the last time step to the first.
template <class T> Sequence<T> sequence(const Tensor& x, bool reverse) {
  if (!x.defined()) return {nullptr, 0, 0, 0};
  Sequence<T> s{data<T>(x), x.stride(0), x.stride(1), x.stride(2)};
  return reverse ? from_the_end(s, x.size(2)) : s;
}

// B or C with two, three or four dimensions.
template <class T> Matrix<T> matrix(const Tensor& x, bool reverse) {
  if (x.dim() == 2) return {data<T>(x), 0, 0, x.stride(0), x.stride(1), 0, false};
  int64_t n = x.dim() - 2;
  int64_t group = n == 2 ? x.stride(1) : 0;
  Matrix<T> m{data<T>(x), x.stride(0), group, 0, x.stride(n), x.stride(n + 1), true};
  return reverse ? from_the_end(m, x.size(-1)) : m;
}

// Whether memory may be tuned for the whole process; mmvim_ops/memory.py says what that is.
inline const bool memory_is_tuned = [] {
  const char* value = std::getenv("MMVIM_OPS_TUNE_MEMORY");
  return value == nullptr || std::string(value) != "0";
}();

// Tell the system that a large tensor is about to be written. The C library takes large blocks from it
// for every call, and filling them in pages of 4 KiB costs as much as a scan.
inline Tensor in_large_pages(Tensor x) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t(1) << 21;
  if (memory_is_tuned && x.nbytes() >= 2 * kPage) {
    auto begin = reinterpret_cast<uintptr_t>(x.const_data_ptr()), end = begin + x.nbytes();
    begin = (begin + kPage - 1) / kPage * kPage, end = end / kPage * kPage;
    // a wish: where it is not granted, everything works as before
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
  return x;
}

// A new tensor with some room behind it. glibc asks for more than the size of aligned memory when it
// looks for a place, so that the place of a freed tensor is too small for the next one of the same
// size: without the room, holes of a tensor's size add up to a tenth of a training's memory.
inline Tensor fresh(at::IntArrayRef size, const at::TensorOptions& options) {
  constexpr int64_t kRoom = 256;
  int64_t count = c10::multiply_integers(size);
  int64_t room = kRoom / int64_t(options.dtype().itemsize());
  Tensor memory = in_large_pages(at::empty({count + room}, options));
  return memory.slice(0, 0, count).view(size);
}
// The same with the strides of x, if these leave nothing out.
inline Tensor fresh_like(const Tensor& x) {
  if (!x.is_non_overlapping_and_dense()) return in_large_pages(at::empty_like(x));
  return fresh({x.numel()}, x.options()).as_strided(x.sizes(), x.strides());
}

}  // namespace mmvim
