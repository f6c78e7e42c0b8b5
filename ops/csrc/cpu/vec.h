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
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
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
#elif defined(__aarch64__)
template <> MMVIM_INLINE F max(F a, F b) { return F(vmaxq_f32(float32x4_t(a), float32x4_t(b))); }
template <> MMVIM_INLINE F min(F a, F b) { return F(vminq_f32(float32x4_t(a), float32x4_t(b))); }
#endif

using Integers = VecOf<float>::integer;
MMVIM_INLINE Integers bits(F x) {
  Integers n;
  std::memcpy(&n, &x, sizeof n);
  return n;
}
MMVIM_INLINE F from_bits(Integers n) {
  F x;
  std::memcpy(&x, &n, sizeof x);
  return x;
}

MMVIM_INLINE F minus_magnitude(F x) { return from_bits(bits(x) | INT32_MIN); }     // -|x|
MMVIM_INLINE D minus_magnitude(D x) { return min(x, -x); }
// The larger one of |a| and |b|, NaN if one is: as an integer NaN is above all numbers.
MMVIM_INLINE F largest(F a, F b) {
  Integers x = bits(a) & INT32_MAX, y = bits(b) & INT32_MAX;
  return from_bits(x > y ? x : y);
}

// 2^f for |f| <= 1/2 by Horner's rule, relative error below 1e-7 and exactly 1 at 0: a minimax fit of
// this project.
constexpr float kExp2[] = {0.001326472731307149f, 0.009671512991189957f, 0.05550733581185341f,
                           0.24022242426872253f,  0.6931470036506653f,   1.f};
MMVIM_INLINE F exp2_fraction(F f) {
  F p = fma(splat(kExp2[0]), f, splat(kExp2[1]));
  p = fma(p, f, splat(kExp2[2]));
  p = fma(p, f, splat(kExp2[3]));
  p = fma(p, f, splat(kExp2[4]));
  return fma(p, f, splat(kExp2[5]));
}

constexpr float kLog2e = 1.44269504088896341f;

// x / ln 2 - n. ln 2 in two parts, the first of so few bits that n times it is exact.
MMVIM_INLINE F exp_remainder(F x, F n) {
  F r = fma(n, splat(-0.693359375f), x);
  return fma(n, splat(2.12194440e-4f), r) * splat(kLog2e);
}

// exp_exact(x) = exp(x) for x <= 0, relative error below 1e-6 however large -x is, except that what is
// below the normal numbers may be 0; exp_minus(x) = exp(-x) where only the sum with 1 counts.
#if defined(__AVX512F__) && defined(__AVX512DQ__)
// ±inf and NaN need no care: reduce(±inf) is 0 and scalef saturates.
MMVIM_INLINE F exp2(F x) {
  F n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  F f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(exp2_fraction(f), n);
}
MMVIM_INLINE F exp_minus(F x) { return exp2(x * -kLog2e); }
MMVIM_INLINE F exp_exact(F x) {
  x = max(splat(-200.f), x);
  F n = _mm512_roundscale_ps(x * splat(kLog2e), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(exp2_fraction(exp_remainder(x, n)), n);
}
#else
// Adding kShift rounds to an integer n and leaves n + 127 in the low bits, which are moved into the
// exponent. Arguments are clamped so that 2^128 is inf and 2^-127 is 0; nothing denormal.
constexpr float kShift = 12582912.f + 127.f;
MMVIM_INLINE F exp2_integer(F shifted) { return from_bits(bits(shifted) << 23); }
MMVIM_INLINE F exp2(F x) {
  x = min(splat(128.f), max(splat(-127.f), x));
  F shifted = x + splat(kShift), n = shifted - splat(kShift);
  return exp2_fraction(x - n) * exp2_integer(shifted);
}
MMVIM_INLINE F exp_minus(F x) {
  x = min(splat(88.0296919f), max(splat(-88.7228391f), x));
  F shifted = fma(x, splat(-kLog2e), splat(kShift)), minus_n = splat(kShift) - shifted;
  return exp2_fraction(fma(x, splat(-kLog2e), minus_n)) * exp2_integer(shifted);
}
MMVIM_INLINE F exp_exact(F x) {
  x = max(splat(-88.0296919f), x);
  F shifted = fma(x, splat(kLog2e), splat(kShift)), n = shifted - splat(kShift);
  return exp2_fraction(exp_remainder(x, n)) * exp2_integer(shifted);
}
#endif

// to + ln(1 + w) for 0 <= w <= 1 with 2 artanh(w / (2 + w)), whose relative error is below 1e-7
// however small w is.
MMVIM_INLINE F add_log1p(F to, F w) {
  F s = w / (splat(2.f) + w), y = s * s;
  F p = fma(splat(0.2802445888519287f), y, splat(0.27999141812324524f));
  p = fma(p, y, splat(0.4002169966697693f));
  p = fma(p, y, splat(0.6666641235351562f));
  return fma(s, fma(p, y, splat(2.f)), to);
}

// Double precision serves checks of gradients: exact, lane by lane.
MMVIM_INLINE D exp(D x) {
  for (int i = 0; i < kLanes<double>; i++) x[i] = std::exp(x[i]);
  return x;
}
MMVIM_INLINE D exp_exact(D x) { return exp(x); }
MMVIM_INLINE D exp_minus(D x) { return exp(-x); }
MMVIM_INLINE D add_log1p(D to, D w) {
  for (int i = 0; i < kLanes<double>; i++) to[i] += std::log1p(w[i]);
  return to;
}

// exp(Δ A) with `A` = kDecayScale · A: float works in base 2 to save a product.
template <class T> constexpr T kDecayScale = sizeof(T) == 4 ? T(kLog2e) : T(1);
MMVIM_INLINE F decay(F delta, F A) { return exp2(delta * A); }
MMVIM_INLINE D decay(D delta, D A) { return exp(delta * A); }

// N of them at a time, written so that the compiler has them take turns: one alone is a chain of
// instructions that wait for each other, and processors look ahead only so far. Where |Δ A| is known
// to be at most kBound, no clamps are needed, and n is added to the exponent; AVX-512, whose
// instructions clamp by themselves, gains nothing by that.
constexpr float kBound = 124;
template <class V> constexpr bool kBoundedIsFaster = std::is_same<V, F>::value && kBytes < 64;
template <bool kBounded, class V, int N> MMVIM_INLINE void decays(V delta, const V* A, V (&to)[N]) {
  if constexpr (kBounded) {
    const F shift = splat(12582912.f);
    F shifted[N], f[N];
    for (int i = 0; i < N; i++) shifted[i] = fma(delta, A[i], shift);
    for (int i = 0; i < N; i++) f[i] = fma(delta, A[i], shift - shifted[i]);
    for (int i = 0; i < N; i++) to[i] = fma(splat(kExp2[0]), f[i], splat(kExp2[1]));
    for (int k = 2; k < 6; k++)
      for (int i = 0; i < N; i++) to[i] = fma(to[i], f[i], splat(kExp2[k]));
    for (int i = 0; i < N; i++) to[i] = from_bits(bits(to[i]) + (bits(shifted[i]) << 23));
  } else {
    for (int i = 0; i < N; i++) to[i] = decay(delta, A[i]);
  }
}

// ln(1 + exp(x)) and its derivative 1 / (1 + exp(-x)), without overflow or cancellation.
template <class V> MMVIM_INLINE V softplus(V x, V& derivative) {
  const V zero{}, one = zero + 1;
  V w = exp_exact(minus_magnitude(x));
  derivative = (x < zero ? w : one) / (one + w);
  return add_log1p(max(zero, x), w);
}
// 1 / (1 + exp(-x)), the error below 1e-7: it is a factor, so a small one need not be exact.
template <class V> MMVIM_INLINE V sigmoid(V x) { return 1 / (1 + exp_minus(x)); }
// x times the same.
template <class V> MMVIM_INLINE V silu(V x) { return x / (1 + exp_minus(x)); }

}  // namespace
