// The last step of backward: partial sums, which blocks have left, are added up and written as the
// gradients that the caller wants, all of them in one launch.
//
// A block has some of the columns of one sum. Its threads are cut into parts: each adds up every
// `parts`-th row of four neighbouring columns, then the first part adds up those of the others. No
// atomics: results do not depend on the order of execution.
#pragma once
#include "args.h"

namespace mmvim {

constexpr int kFinishThreads = 128, kFinishMost = 32;    // most: of the parts of a block
constexpr int kColumns = 4;
constexpr int64_t kFinishBlocks = 512;    // of a sum: with fewer, rows are shared by more threads
constexpr int kMostSums = 10;             // of two directions, five each

// to[o, i] = Σ_r from[o, r, i] for o < outer, i < inner. With several `lines` the last dimension of
// `from` is (lines, inner / lines) and that of `to` (inner / lines, lines): few elements, so that it
// is enough to read them side by side.
struct Sum {
  const float* from;
  void* to;
  int64_t dtype;
  int64_t outer, rows, inner, lines;
  int64_t stride;            // from row to row; between two of the outer dimension there are `rows`
  int64_t blocks;            // per element of the outer dimension
  int parts;
  bool in_words;             // four columns are one word, there and here

  int64_t pieces() const { return (inner + kColumns - 1) / kColumns; }
};

struct Sums {
  int64_t count = 0;
  int64_t first[kMostSums + 1] = {};    // block of a sum; at last, the number of blocks
  Sum sum[kMostSums];

  // Where nothing is wanted, nothing is added.
  void add(const Gradient& to, const float* from, int64_t outer, int64_t rows, int64_t stride,
           int64_t inner, int64_t lines) {
    if (to.data == nullptr || outer * inner == 0) return;
    Sum s{from, to.data, to.dtype, outer, rows, inner, lines, stride, 0, 1, false};
    auto blocks = [&] {
      int64_t width = kFinishThreads / s.parts;
      return (s.pieces() + width - 1) / width;
    };
    while (s.parts < kFinishMost && 2 * s.parts <= rows && outer * blocks() < kFinishBlocks)
      s.parts *= 2;
    s.blocks = blocks();
    auto whole = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
    s.in_words = stride % kColumns == 0 && inner % kColumns == 0 && whole(from) && whole(to.data);
    first[count + 1] = first[count] + outer * s.blocks;
    sum[count++] = s;
  }
};

// Start the kernel; returns what is wrong, null where nothing is.
const char* add_up(const Sums& sums, int64_t stream);

}  // namespace mmvim
