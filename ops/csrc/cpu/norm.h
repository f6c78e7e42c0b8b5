// The root mean square norm of rows.
#pragma once
#include "tile.h"

namespace {

template <class T> void norm(const mmvim::NormArgs<T>& args, int64_t begin, int64_t end) {
  constexpr int W = kLanes<T>;
  for (int64_t i = begin; i < end; i++) {
    const T* x = args.x + i * args.channels;
    T* y = args.y + i * args.channels;
    auto lanes = [&](int64_t c) { return int(args.channels - c < W ? args.channels - c : W); };
    Vec<T> squares{};
    for (int64_t c = 0; c < args.channels; c += W) {
      Vec<T> part = load_lanes(x + c, 1, lanes(c));
      squares = fma(part, part, squares);
    }
    Vec<T> factor = splat(T(1) / std::sqrt(sum<T>(squares) / T(args.channels) + args.eps));
    for (int64_t c = 0; c < args.channels; c += W) {
      Vec<T> weight = load_lanes(args.weight + c, 1, lanes(c));
      store_lanes(y + c, 1, lanes(c), load_lanes(x + c, 1, lanes(c)) * factor * weight);
    }
  }
}

}  // namespace
