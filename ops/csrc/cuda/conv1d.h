// The depthwise causal convolution, out_t = act(bias + Σ_k w_k x_{t - (taps - 1) + k}), and its
// gradients. A block has 32 channels and kConvSteps steps in shared memory, with the steps before
// (backward: and after) that its taps reach; time is counted from where the filters look back to.
#pragma once
#include "args.h"
#include "device.h"

namespace mmvim {

constexpr int kConvThreads = 128, kConvWidth = 32, kConvPitch = kConvWidth + 1;
constexpr int kConvParts = kConvThreads / kConvWidth;     // threads that share a channel
constexpr int kConvRun = kConvSteps / kConvParts;

inline int64_t conv_tiles(int64_t length) { return (length + kConvSteps - 1) / kConvSteps; }

struct ConvPlace {
  int64_t batch, first_channel, first, tile;    // first: step
  int channels, steps, channel, part;

  __device__ explicit ConvPlace(const Convolution& conv) {
    int64_t blocks = (conv.channels + kConvWidth - 1) / kConvWidth;
    int64_t tiles = (conv.length + kConvSteps - 1) / kConvSteps, i = blockIdx.x;
    first_channel = i % blocks * kConvWidth, i /= blocks;
    tile = i % tiles, batch = i / tiles, first = tile * kConvSteps;
    int64_t left = conv.length - first, wide = conv.channels - first_channel;
    steps = int(left < kConvSteps ? left : kConvSteps);
    channels = int(wide < kConvWidth ? wide : kConvWidth);
    channel = int(threadIdx.x) % kConvWidth, part = int(threadIdx.x) / kConvWidth;
  }

  // f(t, c, address) for the rows from first + from on, neighbours in memory side by side; the
  // address is null outside of the sequence.
  template <class T, class F>
  __device__ void each(const Convolution& conv, const Sequence& x, int from, int rows, F f) const {
    int64_t at_time = x.time < 0 ? -x.time : x.time;
    bool channels_first = (x.channel < 0 ? -x.channel : x.channel) <= at_time;
    int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    auto one = [&](int t, int c) {
      int64_t step = first + from + t;
      bool exists = step >= 0 && step < conv.length && c < channels;
      int64_t time = conv.reverse ? conv.length - 1 - step : step;
      T* data = static_cast<T*>(x.data);
      f(t, c, exists ? data + batch * x.batch + (first_channel + c) * x.channel + time * x.time
                     : nullptr);
    };
    if (channels_first) {
      for (int t = warp; t < rows; t += kConvThreads / 32) one(t, lane);
    } else {
      for (int c = warp; c < kConvWidth; c += kConvThreads / 32)
        for (int t = lane; t < rows; t += 32) one(t, c);
    }
  }
};

// Filters of this thread's channel: in registers where their number is known.
template <int kTaps> struct Filter {
  float weight[kTaps > 0 ? kTaps : 1];
  const float* from = nullptr;
  int taps;

  __device__ Filter(const Convolution& conv, const ConvPlace& place) : taps(int(conv.taps)) {
    if (place.channel >= place.channels) return;
    from = conv.weight + (place.first_channel + place.channel) * conv.taps;
    if constexpr (kTaps > 0)
      for (int k = 0; k < kTaps; k++) weight[k] = from[k];
  }
  // f(k, w_k)
  template <class F> __device__ __forceinline__ void each(F f) const {
    if constexpr (kTaps > 0) {
#pragma unroll
      for (int k = 0; k < kTaps; k++) f(k, weight[k]);
    } else {
      for (int k = 0; k < taps; k++) f(k, from[k]);
    }
  }
};

template <class T, int kTaps>
__global__ void __launch_bounds__(kConvThreads)
conv_forward(const __grid_constant__ Convolution conv) {
  MMVIM_SHARED(memory);
  ConvPlace place(conv);
  Filter<kTaps> filter(conv, place);
  const int before = int(conv.taps) - 1, c = place.channel;
  float* x = reinterpret_cast<float*>(memory);                   // (before + kConvSteps, width)
  float* out = x + (before + kConvSteps) * kConvPitch;           // (kConvSteps, width)
  place.each<const T>(conv, conv.x, -before, before + place.steps, [&](int t, int c, const T* at) {
    x[t * kConvPitch + c] = at == nullptr ? 0.f : to_float(*at);
  });
  __syncthreads();
  if (c < place.channels) {
    float bias = conv.bias == nullptr ? 0.f : conv.bias[place.first_channel + c];
#pragma unroll 4
    for (int t = place.part * kConvRun; t < (place.part + 1) * kConvRun; t++) {
      if (t >= place.steps) break;
      float sum = bias;
      filter.each([&](int k, float w) { sum = fmaf(w, x[(t + k) * kConvPitch + c], sum); });
      out[t * kConvPitch + c] = conv.silu ? sum * sigmoid(sum) : sum;
    }
  }
  __syncthreads();
  place.each<T>(conv, conv.out, 0, place.steps, [&](int t, int c, T* at) {
    if (at != nullptr) assign(*at, out[t * kConvPitch + c]);
  });
}

// With g the gradient before the activation: ∂x_t = Σ_k w_k g_{t + taps - 1 - k},
// ∂w_k = Σ_t g_t x_{t - (taps - 1) + k}. Sums over time are left per tile;
// finish.h adds them up.
template <class T, int kTaps>
__global__ void __launch_bounds__(kConvThreads)
conv_backward(const __grid_constant__ Convolution conv) {
  MMVIM_SHARED(memory);
  ConvPlace place(conv);
  Filter<kTaps> filter(conv, place);
  const int taps = int(conv.taps), halo = taps - 1, c = place.channel;
  const int rows = kConvSteps + halo;
  float* x = reinterpret_cast<float*>(memory);       // (halo + rows, width), later the result
  float* g = x + (halo + rows) * kConvPitch;         // (rows, width)
  float* sums = g + rows * kConvPitch;               // (parts, taps + 1, width)
  place.each<const T>(conv, conv.x, -halo, halo + rows, [&](int t, int c, const T* at) {
    x[t * kConvPitch + c] = at == nullptr ? 0.f : to_float(*at);
  });
  place.each<const T>(conv, conv.grad_out, 0, rows, [&](int t, int c, const T* at) {
    g[t * kConvPitch + c] = at == nullptr ? 0.f : to_float(*at);
  });
  __syncthreads();
  if (conv.silu && c < place.channels) {
    float bias = conv.bias == nullptr ? 0.f : conv.bias[place.first_channel + c];
    for (int t = place.part; t < rows; t += kConvParts) {
      if (place.first + t >= conv.length) break;
      float z = bias;
      filter.each([&](int k, float w) { z = fmaf(w, x[(t + k) * kConvPitch + c], z); });
      float s = sigmoid(z);
      g[t * kConvPitch + c] *= s * fmaf(z, 1 - s, 1.f);
    }
  }
  __syncthreads();
  const int from = place.part * kConvRun;
  const int to = from + kConvRun < place.steps ? from + kConvRun : place.steps;
  for (int k = 0; k <= taps; k++) {                  // w_k, then the bias
    float sum = 0;
    for (int t = from; t < to; t++)
      sum = fmaf(g[t * kConvPitch + c], k < taps ? x[(t + k) * kConvPitch + c] : 1.f, sum);
    sums[(place.part * (taps + 1) + k) * kConvWidth + c] = sum;
  }
  __syncthreads();
  if (c < place.channels)
    for (int t = from; t < to; t++) {
      float sum = 0;
      filter.each([&](int k, float w) { sum = fmaf(w, g[(t + halo - k) * kConvPitch + c], sum); });
      x[t * kConvPitch + c] = sum;
    }
  for (int i = int(threadIdx.x); i < place.channels * (taps + 1); i += kConvThreads) {
    int channel = i % place.channels, k = i / place.channels;
    float sum = 0;
    for (int part = 0; part < kConvParts; part++)
      sum += sums[(part * (taps + 1) + k) * kConvWidth + channel];
    int64_t line = place.batch * ((conv.length + kConvSteps - 1) / kConvSteps) + place.tile;
    conv.partial[(line * (taps + 1) + k) * conv.channels + place.first_channel + channel] = sum;
  }
  __syncthreads();
  place.each<T>(conv, conv.grad_x, 0, place.steps, [&](int t, int c, T* at) {
    if (at != nullptr) assign(*at, x[t * kConvPitch + c]);
  });
}

}  // namespace mmvim
