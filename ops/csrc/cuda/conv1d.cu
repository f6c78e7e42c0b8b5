// Entry points of the convolution.
#include "conv1d.h"
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

template <class T> const char* with_taps(const Convolution& conv, bool backward) {
  return conv.taps == 4 ? run<T, 4>(conv, backward) : run<T, 0>(conv, backward);
}

const char* convolve(const Convolution& conv, bool backward) {
  if (const char* error = use_device(conv.device)) return error;
  if (conv.taps < 1 || conv.taps > kMostTaps) return "the number of taps is out of range";
  switch (conv.dtype) {
    case kFloat32: return with_taps<float>(conv, backward);
    case kFloat16: return with_taps<__half>(conv, backward);
    case kBfloat16: return with_taps<__nv_bfloat16>(conv, backward);
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
