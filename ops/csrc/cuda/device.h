// What the kernels need of the compiler: nvcc's own, or an emulation of it on the CPU for tests
// (MMVIM_EMULATED, tests/ops/cuda_emulation). No torch here.
#pragma once
#include <cstdint>
#include <type_traits>

#ifdef MMVIM_EMULATED
#include "cuda_emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <mutex>

#define MMVIM_SHARED(name) extern __shared__ float4 name[]

namespace mmvim {

__device__ __forceinline__ float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float shuffle_xor(float x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}

// Start a kernel; returns what is wrong, null where nothing is.
template <class... P, class... Q>
const char* launch(void (*kernel)(P...), int64_t blocks, int threads, int64_t shared_bytes,
                   int64_t stream, const Q&... arguments) {
  if (blocks > 0x7fffffff) return "too many blocks for one launch";
  // The limit is the kernel's: until it has started, no other thread may lower it.
  static std::mutex setting;
  std::unique_lock<std::mutex> lock(setting, std::defer_lock);
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024) {
    lock.lock();
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
  }
  if (error == cudaSuccess) {
    kernel<<<unsigned(blocks), unsigned(threads), size_t(shared_bytes),
             reinterpret_cast<cudaStream_t>(stream)>>>(arguments...);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Two copies of the CUDA runtime, torch's and ours, each have a current device.
inline const char* use_device(int64_t device) {
  cudaError_t error = cudaSetDevice(int(device));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Multiprocessors and the shared memory that a block may have, in bytes.
inline const char* device_limits(int64_t device, int64_t* limits) {
  const cudaDeviceAttr attributes[] = {cudaDevAttrMultiProcessorCount,
                                       cudaDevAttrMaxSharedMemoryPerBlockOptin};
  for (int i = 0; i < 2; i++) {
    int value = 0;
    cudaError_t error = cudaDeviceGetAttribute(&value, attributes[i], int(device));
    if (error != cudaSuccess) return cudaGetErrorString(error);
    limits[i] = value;
  }
  return nullptr;
}

}  // namespace mmvim
#endif

namespace mmvim {

// The largest words that so many bytes are moved in, whatever type they are of.
struct __attribute__((aligned(16), may_alias)) Words4 { uint32_t w[4]; };
struct __attribute__((aligned(8), may_alias)) Words2 { uint32_t w[2]; };
typedef uint32_t __attribute__((may_alias)) Word;
template <int kBytes> struct WordsOf { using type = Words4; };
template <> struct WordsOf<8> { using type = Words2; };
template <> struct WordsOf<4> { using type = Word; };

// To the GPU's memory. The compiler may take an assignment of four words apart.
template <class Words> __device__ __forceinline__ void store(Words* to, const Words& x) { *to = x; }
#ifndef MMVIM_EMULATED
__device__ __forceinline__ void store(Words4* to, const Words4& x) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :: "l"(to), "r"(x.w[0]), "r"(x.w[1]), "r"(x.w[2]), "r"(x.w[3]) : "memory");
}
#endif

template <int N, class T> __device__ __forceinline__ void copy_words(T* to, const T* from) {
  using Words = typename WordsOf<sizeof(T) * N>::type;
#pragma unroll
  for (int i = 0; i < int(sizeof(T) * N / sizeof(Words)); i++)
    reinterpret_cast<Words*>(to)[i] = reinterpret_cast<const Words*>(from)[i];
}

template <int N, class T> __device__ __forceinline__ void store_words(T* to, const T* from) {
  using Words = typename WordsOf<sizeof(T) * N>::type;
#pragma unroll
  for (int i = 0; i < int(sizeof(T) * N / sizeof(Words)); i++)
    store(reinterpret_cast<Words*>(to) + i, reinterpret_cast<const Words*>(from)[i]);
}

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLargest = 3.4028234e38f;
constexpr float kLn2 = 0.69314718055994531f;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void assign(float& to, float x) { to = x; }
__device__ __forceinline__ void assign(__half& to, float x) { to = __float2half(x); }
__device__ __forceinline__ void assign(__nv_bfloat16& to, float x) { to = __float2bfloat16(x); }

__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1 + exp2(-kLog2e * x)); }

// max(x, 0) + log1p(e) with e = exp(-|x|); log1p(e) / e is a polynomial (Chebyshev fit on [0, 1],
// relative error below 2e-7), so that nothing is lost where e is tiny.
__device__ __forceinline__ float softplus(float x) {
  float e = exp2(-kLog2e * fabsf(x)), p = 0.005253457796061413f;
  p = fmaf(p, e, -0.02958850738905313f);
  p = fmaf(p, e, 0.0783616680125306f);
  p = fmaf(p, e, -0.13674769705009457f);
  p = fmaf(p, e, 0.19111431080335567f);
  p = fmaf(p, e, -0.24844369892403637f);
  p = fmaf(p, e, 0.33319271342492124f);
  p = fmaf(p, e, -0.4999950151678652f);
  p = fmaf(p, e, 1.f);
  return fmaf(e, p, fmaxf(x, 0.f));
}

// How a caller names the element type of sequences and matrices.
enum Dtype : int64_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

}  // namespace mmvim
