// Matrix products y = x weightᵀ + bias, as linear layers and their gradients take them.
//
// Lanes are neighbouring output channels. A panel is the weights of a few vectors of them, packed
// so that they are read in order, and stays in the first-level cache while the rows of x pass by. A
// few rows times a panel are summed in registers.
#pragma once
#include "tile.h"

namespace {

// Vectors of sums in registers: enough to hide the latency of a multiply-add, with some registers
// left for the factors. Of 32 registers, or of 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kSums = 24;
#else
constexpr int kSums = 12;
#endif
// Inputs that are packed together.
constexpr int kPacked = 512;
// Vectors of a panel; the last one has one more where their number is odd.
constexpr int kPanel = 2, kMostOfPanel = kPanel + 1;

// How x and weights are multiplied: number by number. kernels_bf16.cpp has pairs in their place.
struct Singles {
  template <class T> static MMVIM_INLINE Vec<T> repeat(const T* x) { return splat(*x); }
  template <class V> static MMVIM_INLINE V add(V factor, V weight, V sum) {
    return fma(factor, weight, sum);
  }
  // The weights of `lanes` outputs as `in` vectors.
  template <class T>
  static void pack(Vec<T>* panel, const T* weight, int64_t out_stride, int64_t in_stride, int in,
                   int lanes, T*) {
    load_tile(panel, weight, out_stride, in_stride, in, lanes);
  }
};

// Where the sums of some rows start, and what they are made of.
template <class T> struct RowsTimesPanel {
  const T* x;
  int64_t x_row, x_in;
  int in;
  const Vec<T>* panel;       // (vectors, in)
  T* y;
  int64_t y_row;
  int channels;
  const Vec<T>* bias;        // null: add to y
};

template <class Kind, int kRows, int kVectors, bool kRowsAreNeighbours, class T>
__attribute__((noinline)) void multiply(const RowsTimesPanel<T>& p) {
  constexpr int W = kLanes<T>;
  const T* x = p.x;
  const int64_t x_row = kRowsAreNeighbours ? 1 : p.x_row, x_in = kRowsAreNeighbours ? p.x_in : 1;
  const int lanes = p.channels - (kVectors - 1) * W;     // of the last vector
  Vec<T> sums[kRows][kVectors];
#pragma GCC unroll 24
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; j++)
      sums[r][j] = p.bias ? p.bias[j]
                          : load_lanes(p.y + r * p.y_row + j * W, 1, j + 1 < kVectors ? W : lanes);
  for (int k = 0; k < p.in; k++, x += x_in) {
    Vec<T> weight[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; j++) weight[j] = p.panel[j * p.in + k];
#pragma GCC unroll 24
    for (int r = 0; r < kRows; r++) {
      Vec<T> factor = Kind::repeat(x + r * x_row);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; j++) sums[r][j] = Kind::add(factor, weight[j], sums[r][j]);
    }
  }
#pragma GCC unroll 24
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; j++)
      store_lanes(p.y + r * p.y_row + j * W, 1, j + 1 < kVectors ? W : lanes, sums[r][j]);
}

template <class Kind, int kVectors, bool kRowsAreNeighbours, class T>
void multiply_rows(RowsTimesPanel<T> p, int64_t rows) {
  constexpr int kRows = kSums / kVectors;
  auto some = [&](auto count) {
    multiply<Kind, decltype(count)::value, kVectors, kRowsAreNeighbours>(p);
    p.x += count * p.x_row, p.y += count * p.y_row, rows -= count;
  };
  while (rows >= kRows) some(std::integral_constant<int, kRows>());
  while (rows >= 4) some(std::integral_constant<int, 4>());
  while (rows > 0) some(std::integral_constant<int, 1>());
}

// Rows [first, last) times the panel that starts at `channel`.
template <class Kind, int kVectors, class T>
void multiply_panel(const mmvim::ProductArgs<T>& args, int64_t channel, int64_t first, int64_t last,
                    Vec<T>* panel) {
  constexpr int W = kLanes<T>;
  int64_t left = args.out - channel;
  int channels = int(left < kVectors * W ? left : kVectors * W);
  auto lanes = [&](int j) { return channels - j * W < W ? channels - j * W : W; };
  Vec<T> bias[kVectors] = {};
  for (int j = 0; args.bias && j < kVectors; j++)
    bias[j] = load_lanes(args.bias + channel + j * W, 1, lanes(j));
  for (int64_t k = 0; k == 0 || k < args.in; k += kPacked) {      // also without any input
    int in = int(args.in - k < kPacked ? args.in - k : kPacked);
    const T* weight = args.weight + channel * args.weight_out + k * args.weight_in;
    for (int j = 0; j < kVectors; j++)
      Kind::pack(panel + j * in, weight + j * W * args.weight_out, args.weight_out, args.weight_in,
                 in, lanes(j), reinterpret_cast<T*>(panel + kVectors * in));
    RowsTimesPanel<T> p{args.x + first * args.x_row + k * args.x_in,
                        args.x_row,
                        args.x_in,
                        in,
                        panel,
                        args.y + first * args.y_row + channel,
                        args.y_row,
                        channels,
                        k > 0 || args.accumulate ? nullptr : bias};
    if (args.x_in == 1) multiply_rows<Kind, kVectors, false>(p, last - first);
    else multiply_rows<Kind, kVectors, true>(p, last - first);
  }
}

template <class T> int64_t product_panels(int64_t out) {
  int64_t panels = (out + kLanes<T> - 1) / kLanes<T> / kPanel;
  return panels > 1 ? panels : 1;
}

template <class T> int64_t product_scratch(int64_t in) {
  return (in < kPacked ? in : kPacked) * kMostOfPanel * int64_t(sizeof(Vec<T>));
}

// Tasks are panels of chunks of rows, all panels of a chunk together.
template <class Kind, class T>
void product_of(const mmvim::ProductArgs<T>& args, int64_t begin, int64_t end, char* scratch) {
  Vec<T>* panel = reinterpret_cast<Vec<T>*>(scratch);
  const int64_t panels = product_panels<T>(args.out);
  for (int64_t i = begin; i < end; i++) {
    int64_t first = i / panels * args.rows / args.chunks;
    int64_t last = (i / panels + 1) * args.rows / args.chunks;
    int64_t channel = i % panels * kPanel * kLanes<T>, left = args.out - channel;
    bool is_last = i % panels == panels - 1;
    if (!is_last || (left > kLanes<T> && left <= kPanel * kLanes<T>))
      multiply_panel<Kind, kPanel>(args, channel, first, last, panel);
    else if (left <= kLanes<T>) multiply_panel<Kind, 1>(args, channel, first, last, panel);
    else multiply_panel<Kind, kMostOfPanel>(args, channel, first, last, panel);
  }
}

template <class T>
void product(const mmvim::ProductArgs<T>& args, int64_t begin, int64_t end, char* scratch) {
  product_of<Singles>(args, begin, end, scratch);
}

}  // namespace
