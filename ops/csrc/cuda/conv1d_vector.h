// The convolution with four taps where neighbouring channels are neighbours in memory. A thread has
// a few channels, which it moves as one word, and a run of time steps; what the taps look back to
// is in its registers. Steps are counted from where the filters look back to.
#pragma once
#include <cstring>

#include "args.h"
#include "device.h"

namespace mmvim {

constexpr int kVectorTaps = 4, kHalo = kVectorTaps - 1;
constexpr int64_t kEnoughBlocks = 1024;    // with fewer, threads get shorter runs

// Eight lanes read 128 bytes of a step.
constexpr int kForwardLanes = 8, kForwardParts = 16;
template <class T> constexpr int kForwardWide = 16 / sizeof(T);

// Backward keeps four times as much per channel, so that a thread has four of them in any type.
constexpr int kBackwardLanes = 16, kBackwardWide = 4;

template <int kLanes, int kWide, int kRun> struct VectorPlace {
  unsigned batch, tile;
  int lane, part;
  int64_t channel, step;          // of this thread, the first

  __device__ VectorPlace(const Convolution& conv, int parts) {
    constexpr int kWidth = kLanes * kWide;
    unsigned steps = unsigned(parts) * kRun, i = blockIdx.x;
    unsigned blocks = unsigned((conv.channels + kWidth - 1) / kWidth);
    unsigned tiles = unsigned((conv.length + steps - 1) / steps);
    lane = int(threadIdx.x) % kLanes, part = int(threadIdx.x) / kLanes;
    channel = int64_t(i % blocks) * kWidth + lane * kWide, i /= blocks;
    tile = i % tiles, batch = i / tiles;
    step = int64_t(tile) * steps + part * kRun;
  }
  __device__ bool exists(const Convolution& conv) const {
    return channel < conv.channels && step < conv.length;
  }
};

// One of the elements that a word consists of. As an array of T, or of 16-bit pieces, each would
// get a register of its own.
template <class T> __device__ __forceinline__ float element(uint32_t word, int i) {
  T part[sizeof(word) / sizeof(T)];
  memcpy(part, &word, sizeof(word));
  return to_float(part[i]);
}
template <> __device__ __forceinline__ float element<__nv_bfloat16>(uint32_t word, int i) {
  word = i ? word & 0xffff0000u : word << 16;
  float x;
  memcpy(&x, &word, sizeof(x));
  return x;
}

// This thread's channels of a sequence: from which step on, and how far to the next one.
template <class T, int kWide> struct Line {
  static constexpr int kPer = sizeof(uint32_t) / sizeof(T);    // elements of a word
  using Words = typename WordsOf<sizeof(T) * kWide>::type;
  struct Step {
    Words words;
    __device__ __forceinline__ float operator[](int c) const {
      return element<T>(words.w[c / kPer], c % kPer);
    }
  };
  T* at;
  int64_t stride;

  template <class Place>
  __device__ Line(const Convolution& conv, const Sequence& x, const Place& place, int from) {
    int64_t step = place.step + from, time = conv.reverse ? conv.length - 1 - step : step;
    at = static_cast<T*>(x.data) + place.batch * x.batch + place.channel + time * x.time;
    stride = conv.reverse ? -x.time : x.time;
  }
  // Zeros where the step does not exist.
  __device__ __forceinline__ Step read(bool exists) {
    Step step{};
    if (exists) step.words = *reinterpret_cast<const Words*>(at);
    at += stride;
    return step;
  }
  __device__ __forceinline__ void write(bool exists, const float* values) {
    Words words;
#pragma unroll
    for (int c = 0; c < kWide; c += kPer) {
      T part[kPer];
#pragma unroll
      for (int i = 0; i < kPer; i++) assign(part[i], values[c + i]);
      memcpy(&words.w[c / kPer], part, sizeof(part));
    }
    if (exists) store(reinterpret_cast<Words*>(at), words);
    at += stride;
  }
};

template <int kWide> struct VectorFilter {
  alignas(16) float weight[kWide][kVectorTaps];
  alignas(16) float bias[kWide];

  __device__ VectorFilter(const float* weights, const float* biases, int64_t channel) {
#pragma unroll
    for (int c = 0; c < kWide; c++) {
      copy_words<kVectorTaps>(weight[c], weights + (channel + c) * kVectorTaps);
      bias[c] = 0;
    }
    if (biases != nullptr) copy_words<kWide>(bias, biases + channel);
  }
};

// With kPair there are two convolutions of x, the second in the opposite direction; its `reverse`
// is not read.
template <class T, int kRun, bool kPair>
__global__ void __launch_bounds__(kForwardLanes * kForwardParts, kPair ? 3 : 4)
conv_forward_vector(const __grid_constant__ Convolution conv) {
  constexpr int kWide = kForwardWide<T>, kRead = kHalo + kRun + (kPair ? kHalo : 0);
  using Row = Line<T, kWide>;
  VectorPlace<kForwardLanes, kWide, kRun> place(conv, kForwardParts);
  if (!place.exists(conv)) return;
  const int64_t left = conv.length - place.step;
  const int from = place.step < kHalo ? int(kHalo - place.step) : 0;
  const int to = kHalo + int(left < kRun + kHalo ? left : kRun + kHalo);    // steps from - halo on
  Row in(conv, conv.x, place, -kHalo);
  typename Row::Step x[kRead];
#pragma unroll
  for (int i = 0; i < kRead; i++) x[i] = in.read(i >= from && i < to);

  auto convolve = [&](const float* weight, const float* bias, const Sequence& result, auto tap) {
    const VectorFilter<kWide> filter(weight, bias, place.channel);
    Row out(conv, result, place, 0);
#pragma unroll
    for (int i = 0; i < kRun; i++) {
      float sum[kWide];
#pragma unroll
      for (int c = 0; c < kWide; c++) {
        sum[c] = filter.bias[c];
#pragma unroll
        for (int k = 0; k < kVectorTaps; k++)
          sum[c] = fmaf(filter.weight[c][k], x[tap(i, k)][c], sum[c]);
      }
      if (conv.silu) {
#pragma unroll
        for (int c = 0; c < kWide; c++) sum[c] *= sigmoid(sum[c]);
      }
      out.write(kHalo + i < to, sum);
    }
  };
  convolve(conv.weight, conv.bias, conv.out, [](int i, int k) { return i + k; });
  if constexpr (kPair)
    convolve(conv.second.weight, conv.second.bias, conv.second.out,
             [](int i, int k) { return i + 2 * kHalo - k; });
}

// As conv_backward of conv1d.h, with the same tiles.
template <class T, int kRun>
__global__ void __launch_bounds__(kBackwardLanes * kConvSteps / kRun,
                                  (sizeof(T) == 4 ? 3 : 4) * kRun / 8)
conv_backward_vector(const __grid_constant__ Convolution conv) {
  constexpr int kWide = kBackwardWide, kParts = kConvSteps / kRun, kWidth = kBackwardLanes * kWide;
  constexpr int kGroup = 4, kRows = kVectorTaps + 1;
  using Row = Line<T, kWide>;
  MMVIM_SHARED(memory);
  VectorPlace<kBackwardLanes, kWide, kRun> place(conv, kParts);
  alignas(16) float sums[kRows][kWide] = {};        // of the weights, then of the bias
  if (place.exists(conv)) {
    const VectorFilter<kWide> filter(conv.weight, conv.bias, place.channel);
    const int64_t left = conv.length - place.step;
    const int to = int(left < kRun + kHalo ? left : kRun + kHalo);
    Row x_line(conv, conv.x, place, -kHalo), g_line(conv, conv.grad_out, place, 0);
    Row out(conv, conv.grad_x, place, 0);
    // Of a group of steps and the halo before it; g is before the activation.
    float x[kHalo + kGroup][kWide], g[kHalo + kGroup][kWide];
#pragma unroll
    for (int i = 0; i < kHalo; i++) {
      const auto halo = x_line.read(place.step + i >= kHalo);
#pragma unroll
      for (int c = 0; c < kWide; c++) x[i][c] = halo[c], g[i][c] = 0;
    }
    typename Row::Step next_x[kGroup], next_g[kGroup];
    auto read = [&](int first) {
#pragma unroll
      for (int i = 0; i < kGroup; i++) {
        next_x[i] = x_line.read(first + i < to);
        next_g[i] = g_line.read(first + i < to);
      }
    };
    read(0);
#pragma unroll 1
    for (int first = 0; first < kRun + kHalo; first += kGroup) {
#pragma unroll
      for (int i = 0; i < kGroup; i++)
#pragma unroll
        for (int c = 0; c < kWide; c++) {
          x[kHalo + i][c] = next_x[i][c];
          g[kHalo + i][c] = next_g[i][c];
        }
      if (first < kRun) read(first + kGroup);
      if (conv.silu) {
#pragma unroll
        for (int i = 0; i < kGroup; i++)
#pragma unroll
          for (int c = 0; c < kWide; c++) {
            float z = filter.bias[c];
#pragma unroll
            for (int k = 0; k < kVectorTaps; k++) z = fmaf(filter.weight[c][k], x[i + k][c], z);
            float s = sigmoid(z), slope = s * fmaf(z, 1 - s, 1.f);
            // Past the end x may be infinite, and zero times its slope is not zero.
            g[kHalo + i][c] *= first + i < to ? slope : 0.f;
          }
      }
      if (first < kRun) {           // after that, steps are those of the next thread
#pragma unroll
        for (int i = 0; i < kGroup; i++)
#pragma unroll
          for (int c = 0; c < kWide; c++) {
#pragma unroll
            for (int k = 0; k < kVectorTaps; k++)
              sums[k][c] = fmaf(g[kHalo + i][c], x[i + k][c], sums[k][c]);
            sums[kVectorTaps][c] += g[kHalo + i][c];
          }
      }
#pragma unroll
      for (int i = 0; i < kGroup; i++) {
        const int step = first + i - kHalo;
        if (step < 0) continue;
        float sum[kWide];
#pragma unroll
        for (int c = 0; c < kWide; c++) {
          sum[c] = 0;
#pragma unroll
          for (int k = 0; k < kVectorTaps; k++)
            sum[c] = fmaf(filter.weight[c][k], g[i + kHalo - k][c], sum[c]);
        }
        out.write(step < kRun && step < to, sum);
      }
#pragma unroll
      for (int i = 0; i < kHalo; i++)
#pragma unroll
        for (int c = 0; c < kWide; c++) x[i][c] = x[kGroup + i][c], g[i][c] = g[kGroup + i][c];
    }
  }
  float* shared = reinterpret_cast<float*>(memory);      // (parts, taps + 1, width)
#pragma unroll
  for (int k = 0; k < kRows; k++)
    copy_words<kWide>(shared + (place.part * kRows + k) * kWidth + place.lane * kWide, sums[k]);
  __syncthreads();
  const int64_t first_channel = place.channel - place.lane * kWide;
  const int64_t line = place.batch * ((conv.length + kConvSteps - 1) / kConvSteps) + place.tile;
  for (int i = int(threadIdx.x); i < kRows * kWidth; i += kBackwardLanes * kParts) {
    int k = i / kWidth;
    int64_t channel = first_channel + i % kWidth;
    float sum = 0;
#pragma unroll
    for (int part = 0; part < kParts; part++) sum += shared[part * kRows * kWidth + i];
    if (channel < conv.channels)
      conv.partial[(line * kRows + k) * conv.channels + channel] = sum;
  }
}

}  // namespace mmvim
