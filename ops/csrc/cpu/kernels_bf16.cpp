// Products of bfloat16 numbers, summed in float32, with AVX-512's instruction for pairs of them.
//
// A pair takes the place of a float32 number: x has `in` pairs to a row, and a vector of weights has a
// pair of neighbouring inputs in each lane.
#include "product.h"

namespace {

// Round `count` numbers, an even one.
MMVIM_INLINE void to_pairs(const float* from, int64_t count, float* to) {
  auto some = [](int64_t n) { return __mmask16(n >= 16 ? 0xffff : n > 0 ? (1 << n) - 1 : 0); };
  for (int64_t i = 0; i < count; i += 32) {
    __m512 low = _mm512_maskz_loadu_ps(some(count - i), from + i);
    __m512 high = _mm512_maskz_loadu_ps(some(count - i - 16), from + i + 16);
    _mm512_mask_storeu_epi32(to + i / 2, some((count - i) / 2),
                             (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
}

struct Pairs {
  static MMVIM_INLINE F repeat(const float* x) {
    int bits;
    std::memcpy(&bits, x, sizeof bits);
    return (F)_mm512_set1_epi32(bits);
  }
  static MMVIM_INLINE F add(F factor, F weight, F sum) {
    return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)factor, (__m512bh)weight);
  }
  // `room` is for one vector of outputs.
  static void pack(F* panel, const float* weight, int64_t out_stride, int64_t, int in, int lanes,
                   float* room) {
    for (int i = 0; i < lanes; i++) to_pairs(weight + i * out_stride, 2 * in, room + i * in);
    load_tile(panel, room, in, 1, in, lanes);
  }
};

void round_rows(const float* x, int64_t x_row, int64_t rows, int64_t in, float* pairs) {
  for (int64_t i = 0; i < rows; i++) to_pairs(x + i * x_row, in, pairs + i * (in / 2));
}

void product_of_pairs(const mmvim::ProductArgs<float>& args, int64_t begin, int64_t end,
                      char* scratch) {
  product_of<Pairs>(args, begin, end, scratch);
}

int64_t scratch_of_pairs(int64_t in) {
  return product_scratch<float>(in) / kMostOfPanel * (kMostOfPanel + 1);
}

}  // namespace

extern const mmvim::HalfKernels mmvim_bf16;
const mmvim::HalfKernels mmvim_bf16 = {round_rows, scratch_of_pairs, product_of_pairs};
