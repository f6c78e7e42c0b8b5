// Entry points of the convolution.
#include <initializer_list>

#include "conv1d.h"
#include "conv1d_vector.h"
#include "finish.h"
#include "launch.h"

using namespace mmvim;

namespace {

template <class T, int kTaps> const char* run(const Convolution& conv, bool backward) {
  const int64_t taps = conv.taps, halo = taps - 1;
  const int64_t blocks = conv.batch * conv_tiles(conv.length)
      * ((conv.channels + kConvWidth - 1) / kConvWidth);
  const int64_t rows = backward ? 3 * halo + 2 * kConvSteps : halo + 2 * kConvSteps;
  const int64_t sums = backward ? kConvParts * (taps + 1) * kConvWidth : 0;
  return launch(backward ? conv_backward<T, kTaps> : conv_forward<T, kTaps>, blocks, kConvThreads,
                4 * (rows * kConvPitch + sums), conv.stream, conv);
}

bool whole(const void* data, int64_t bytes = 16) {
  return reinterpret_cast<uintptr_t>(data) % uintptr_t(bytes) == 0;
}

// Whether the kernels of conv1d_vector.h take it, where `wide` channels are one word.
template <class T>
bool fits(const Convolution& conv, int wide, std::initializer_list<Sequence> sequences) {
  if (conv.taps != kVectorTaps || conv.channels % wide) return false;
  for (const SecondFilter& filter : {SecondFilter{0, {}, conv.weight, conv.bias}, conv.second})
    if (!whole(filter.weight) || !whole(filter.bias)) return false;
  for (const Sequence& x : sequences)
    if (!whole(x.data, int64_t(sizeof(T)) * wide) || x.channel != 1 || x.time % wide
        || x.batch % wide)
      return false;
  return true;
}

// Blocks whose threads have `run` steps each.
template <class T> int64_t forward_blocks(const Convolution& conv, int run) {
  const int64_t width = kForwardLanes * kForwardWide<T>, steps = kForwardParts * run;
  return conv.batch * ((conv.length + steps - 1) / steps) * ((conv.channels + width - 1) / width);
}

template <class T, bool kPair> const char* run_vector(const Convolution& conv) {
  const bool long_runs = forward_blocks<T>(conv, 8) >= kEnoughBlocks;
  return launch(long_runs ? conv_forward_vector<T, 8, kPair> : conv_forward_vector<T, 4, kPair>,
                forward_blocks<T>(conv, long_runs ? 8 : 4), kForwardLanes * kForwardParts, 0,
                conv.stream, conv);
}

template <class T> const char* forward(const Convolution& conv) {
  const SecondFilter& second = conv.second;
  if (second.weight != nullptr) {
    if (!conv.reverse != !second.reverse
        && fits<T>(conv, kForwardWide<T>, {conv.x, conv.out, second.out}))
      return run_vector<T, true>(conv);
    Convolution one = conv;
    one.second = {};
    if (const char* error = forward<T>(one)) return error;
    one.weight = second.weight, one.bias = second.bias, one.out = second.out;
    one.reverse = second.reverse;
    return forward<T>(one);
  }
  if (fits<T>(conv, kForwardWide<T>, {conv.x, conv.out})) return run_vector<T, false>(conv);
  return conv.taps == kVectorTaps ? run<T, kVectorTaps>(conv, false) : run<T, 0>(conv, false);
}

template <class T> const char* backward(const Convolution& conv) {
  if (!fits<T>(conv, kBackwardWide, {conv.x, conv.grad_out, conv.grad_x}))
    return conv.taps == kVectorTaps ? run<T, kVectorTaps>(conv, true) : run<T, 0>(conv, true);
  constexpr int kWidth = kBackwardLanes * kBackwardWide;
  const int64_t blocks = conv.batch * conv_tiles(conv.length)
      * ((conv.channels + kWidth - 1) / kWidth);
  const int steps = blocks >= kEnoughBlocks ? 16 : 8, parts = kConvSteps / steps;
  return launch(steps == 16 ? conv_backward_vector<T, 16> : conv_backward_vector<T, 8>, blocks,
                kBackwardLanes * parts, 4 * parts * (kVectorTaps + 1) * kWidth, conv.stream, conv);
}

template <class T> const char* convolve(const Convolution& conv, bool grad) {
  return grad ? backward<T>(conv) : forward<T>(conv);
}

const char* convolve(const Convolution& conv, bool grad) {
  if (const char* error = use_device(conv.device)) return error;
  if (conv.taps < 1 || conv.taps > kMostTaps) return "the number of taps is out of range";
  switch (conv.dtype) {
    case kFloat32: return convolve<float>(conv, grad);
    case kFloat16: return convolve<__half>(conv, grad);
    case kBfloat16: return convolve<__nv_bfloat16>(conv, grad);
  }
  return "unknown element type";
}

}  // namespace

MMVIM_API const char* mmvim_conv_forward(const Convolution* conv) { return convolve(*conv, false); }
MMVIM_API const char* mmvim_conv_backward(const Convolution* conv) {
  if (const char* error = convolve(*conv, true)) return error;
  const int64_t lines = conv->batch * conv_tiles(conv->length), taps = conv->taps;
  const int64_t row = (taps + 1) * conv->channels, weights = taps * conv->channels;
  Sums sums;
  sums.add(conv->grad_weight, conv->partial, 1, lines, row, weights, taps);
  sums.add(conv->grad_bias, conv->partial + weights, 1, lines, row, conv->channels, 1);
  return add_up(sums, conv->stream);
}
