// One SIMD vector of float or double, as wide as the instruction set that the file is compiled for,
// and the few functions the kernels need. GCC's vector extensions give the arithmetic; intrinsics
// stand only where the compiler cannot find the instruction itself.
//
// Everything is in an unnamed namespace: the same code is compiled once per instruction set, and
// the linker must never merge two versions.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define MMVIM_INLINE inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__) && defined(__AVX512DQ__)
constexpr int kBytes = 64;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

template <class T> struct VecOf;
template <> struct VecOf<float> {
  typedef float type __attribute__((vector_size(kBytes)));
  typedef float unaligned __attribute__((vector_size(kBytes), aligned(4), may_alias));
  typedef int32_t integer __attribute__((vector_size(kBytes)));
};
template <> struct VecOf<double> {
  typedef double type __attribute__((vector_size(kBytes)));
  typedef double unaligned __attribute__((vector_size(kBytes), aligned(8), may_alias));
  typedef int64_t integer __attribute__((vector_size(kBytes)));
};
template <class T> using Vec = typename VecOf<T>::type;
using F = Vec<float>;
using D = Vec<double>;

template <class T> constexpr int kLanes = kBytes / int(sizeof(T));

template <class T> MMVIM_INLINE Vec<T> splat(T x) { return x - Vec<T>{}; }
template <class T> MMVIM_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VecOf<T>::unaligned*>(p);
}
template <class T> MMVIM_INLINE void store(T* p, Vec<T> x) {
  *reinterpret_cast<typename VecOf<T>::unaligned*>(p) = x;
}

// a * b + c
template <class V> MMVIM_INLINE V fma(V a, V b, V c) { return a * b + c; }
// The larger and the smaller one; NaN where b is NaN.
template <class V> MMVIM_INLINE V max(V a, V b) { return a > b ? a : b; }
template <class V> MMVIM_INLINE V min(V a, V b) { return a < b ? a : b; }

#if defined(__AVX512F__) && defined(__AVX512DQ__)
template <> MMVIM_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
template <> MMVIM_INLINE D fma(D a, D b, D c) { return _mm512_fmadd_pd(a, b, c); }
template <> MMVIM_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
template <> MMVIM_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
#elif defined(__AVX2__) && defined(__FMA__)
template <> MMVIM_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
template <> MMVIM_INLINE D fma(D a, D b, D c) { return _mm256_fmadd_pd(a, b, c); }
template <> MMVIM_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
template <> MMVIM_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
#endif

// 2^f for |f| <= 1/2, relative error below 1e-7 and exactly 1 at 0: a minimax fit of this project.
MMVIM_INLINE F exp2_fraction(F f) {
  F p = fma(splat(0.001326472731307149f), f, splat(0.009671512991189957f));
  p = fma(p, f, splat(0.05550733581185341f));
  p = fma(p, f, splat(0.24022242426872253f));
  p = fma(p, f, splat(0.6931470036506653f));
  return fma(p, f, splat(1.f));
}

constexpr float kLog2e = 1.44269504088896341f;

// x / ln 2 - n. ln 2 in two parts, the first of so few bits that n times it is exact.
MMVIM_INLINE F exp_remainder(F x, F n) {
  F r = fma(n, splat(-0.693359375f), x);
  return fma(n, splat(2.12194440e-4f), r) * splat(kLog2e);
}

#if defined(__AVX512F__) && defined(__AVX512DQ__)
// ±inf and NaN need no care: reduce(±inf) is 0 and scalef saturates.
MMVIM_INLINE F exp2(F x) {
  F n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  F f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(exp2_fraction(f), n);
}
MMVIM_INLINE F exp(F x) {
  x = min(splat(200.f), max(splat(-200.f), x));
  F n = _mm512_roundscale_ps(x * splat(kLog2e), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(exp2_fraction(exp_remainder(x, n)), n);
}
#else
// 2^n · 2^f with n in the exponent bits of a sum: adding `shift` rounds to an integer and leaves
// n + 127 in the low bits. Clamped so that 2^128 is inf and 2^-127 is 0; nothing denormal.
MMVIM_INLINE F exp2_split(F limited, F& n) {
  const F shift = splat(12582912.f + 127.f);
  F sum = limited + shift;
  n = sum - shift;
  typename VecOf<float>::integer bits;
  std::memcpy(&bits, &sum, sizeof bits);
  bits <<= 23;
  F scale;
  std::memcpy(&scale, &bits, sizeof bits);
  return scale;
}
MMVIM_INLINE F exp2(F x) {
  x = min(splat(128.f), max(splat(-127.f), x));
  F n, scale = exp2_split(x, n);
  return exp2_fraction(x - n) * scale;
}
MMVIM_INLINE F exp(F x) {
  x = min(splat(88.7228391f), max(splat(-88.0296919f), x));
  F n, scale = exp2_split(x * splat(kLog2e), n);
  return exp2_fraction(exp_remainder(x, n)) * scale;
}
#endif

// ln(1 + w) for 0 <= w <= 1 as 2 artanh(w / (2 + w)), relative error below 1e-7 however small w is.
MMVIM_INLINE F log1p_unit(F w) {
  F s = w / (splat(2.f) + w), y = s * s;
  F p = fma(splat(0.2802445888519287f), y, splat(0.27999141812324524f));
  p = fma(p, y, splat(0.4002169966697693f));
  p = fma(p, y, splat(0.6666641235351562f));
  return s * fma(p, y, splat(2.f));
}

// Double precision serves checks of gradients: exact, lane by lane.
MMVIM_INLINE D exp(D x) {
  for (int i = 0; i < kLanes<double>; i++) x[i] = std::exp(x[i]);
  return x;
}
MMVIM_INLINE D log1p_unit(D x) {
  for (int i = 0; i < kLanes<double>; i++) x[i] = std::log1p(x[i]);
  return x;
}

// exp(Δ A) with `scaled` = Δ · decay_scale · A: float works in base 2 to save a product.
template <class T> constexpr T kDecayScale = sizeof(T) == 4 ? T(kLog2e) : T(1);
MMVIM_INLINE F decay(F scaled) { return exp2(scaled); }
MMVIM_INLINE D decay(D scaled) { return exp(scaled); }

// ln(1 + exp(x)) and its derivative 1 / (1 + exp(-x)), without overflow or cancellation.
template <class V> MMVIM_INLINE V softplus(V x, V& derivative) {
  const V zero{}, one = zero + 1;
  V w = exp(min(x, -x));     // -|x|
  derivative = (x < zero ? w : one) / (one + w);
  return max(zero, x) + log1p_unit(w);
}
// 1 / (1 + exp(-x)), the error below 1e-7: it is a factor, so a small one need not be exact.
MMVIM_INLINE F sigmoid(F x) { return 1.f / (1.f + exp2(x * -kLog2e)); }
MMVIM_INLINE D sigmoid(D x) { return 1. / (1. + exp(-x)); }

}  // namespace
