// Adds up partial sums, and the entry point for those of the scan.
#include "finish.h"
#include "device.h"
#include "launch.h"

namespace mmvim {

template <class T>
__device__ __forceinline__ void write_columns(const Sum& sum, int64_t row, int64_t at, int count,
                                           const float (&values)[kColumns]) {
  T* to = static_cast<T*>(sum.to) + row * sum.inner;
  if (sum.in_words && sum.lines == 1) {
    using Words = typename WordsOf<kColumns * sizeof(T)>::type;
    alignas(16) T narrow[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; i++) assign(narrow[i], values[i]);
    *reinterpret_cast<Words*>(to + at) = *reinterpret_cast<const Words*>(narrow);
    return;
  }
  const int64_t columns = sum.inner / sum.lines;
#pragma unroll
  for (int i = 0; i < kColumns; i++)
    if (i < count) assign(to[(at + i) % columns * sum.lines + (at + i) / columns], values[i]);
}

__global__ void __launch_bounds__(kFinishThreads) finish(const __grid_constant__ Sums sums) {
  MMVIM_SHARED(memory);
  float* shared = reinterpret_cast<float*>(memory);      // (parts, width, kColumns)
  int64_t block = blockIdx.x;
  int which = 0;
  while (block >= sums.first[which + 1]) which++;
  const Sum& sum = sums.sum[which];
  block -= sums.first[which];
  const int thread = int(threadIdx.x), parts = sum.parts, width = kFinishThreads / parts;
  const int part = thread / width;
  const int64_t row = block / sum.blocks;
  const int64_t at = (block % sum.blocks * width + thread % width) * kColumns;
  const int64_t left = sum.inner - at;
  const int count = int(left < 0 ? 0 : left < kColumns ? left : kColumns);
  const float* from = sum.from + row * sum.rows * sum.stride + at;
  float total[kColumns] = {};
  if (sum.in_words && count > 0) {
#pragma unroll 4
    for (int64_t r = part; r < sum.rows; r += parts) {
      alignas(16) float values[kColumns];
      *reinterpret_cast<Words4*>(values) = *reinterpret_cast<const Words4*>(from + r * sum.stride);
#pragma unroll
      for (int i = 0; i < kColumns; i++) total[i] += values[i];
    }
  } else {
#pragma unroll 4
    for (int64_t r = part; r < sum.rows; r += parts)
#pragma unroll
      for (int i = 0; i < kColumns; i++)
        if (i < count) total[i] += from[r * sum.stride + i];
  }
  if (parts > 1) {
#pragma unroll
    for (int i = 0; i < kColumns; i++) shared[thread * kColumns + i] = total[i];
    __syncthreads();
    if (part > 0) return;
    for (int other = 1; other < parts; other++)
#pragma unroll
      for (int i = 0; i < kColumns; i++) total[i] += shared[(other * width + thread) * kColumns + i];
  }
  if (count == 0) return;
  if (sum.dtype == kFloat32) return write_columns<float>(sum, row, at, count, total);
  if (sum.dtype == kFloat16) return write_columns<__half>(sum, row, at, count, total);
  write_columns<__nv_bfloat16>(sum, row, at, count, total);
}

const char* add_up(const Sums& sums, int64_t stream) {
  if (sums.count == 0) return nullptr;
  return launch(finish, sums.first[sums.count], kFinishThreads,
                kFinishThreads * kColumns * int64_t(sizeof(float)), stream, sums);
}

}  // namespace mmvim

using namespace mmvim;

// `totals` has one for each direction of `scan`, whose gradients are what backward has left.
MMVIM_API const char* mmvim_scan_finish(const Scan* scan, const Totals* totals) {
  if (const char* error = use_device(scan->device)) return error;
  const int64_t lines = scan->batch * scan->chunks, states = scan->states;
  const int64_t channels = scan->channels;
  Sums sums;
  for (int64_t i = 0; i < scan->directions; i++) {
    const Direction& left = scan->direction[i];
    const Totals& total = totals[i];
    auto per_channel = [&](const Gradient& to, const float* from, int64_t many) {
      sums.add(to, from, 1, lines, many * channels, many * channels, many);
    };
    auto matrix = [&](const Gradient& to, const float* from, const Matrix& m) {
      if (!m.varying) return per_channel(to, from, states);
      const int64_t inner = scan->length * states;
      sums.add(to, from, scan->batch * scan->groups, scan->splits, inner, inner, 1);
    };
    matrix(total.B, left.grad_B, left.B);
    matrix(total.C, left.grad_C, left.C);
    per_channel(total.A, left.grad_A, states);
    per_channel(total.D, left.grad_D, 1);
    per_channel(total.delta_bias, left.grad_delta_bias, 1);
  }
  return add_up(sums, scan->stream);
}
