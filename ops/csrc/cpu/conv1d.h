// Depthwise causal convolution along time, optionally with SiLU.
#pragma once
#include "tile.h"

namespace {

constexpr int kMostTaps = mmvim::kMostTaps;
constexpr int kConvTile = 64;

// Blocks of channels of one batch element.
template <class T> struct ConvTask {
  int64_t batch, first, last;

  MMVIM_INLINE ConvTask(const mmvim::ConvArgs<T>& args, int64_t index) {
    int64_t blocks = (args.channels + kLanes<T> - 1) / kLanes<T>, split = index % args.splits;
    batch = index / args.splits;
    first = split * blocks / args.splits;
    last = (split + 1) * blocks / args.splits;
  }
};

template <class T> struct Convolution {
  using V = Vec<T>;
  const mmvim::ConvArgs<T>& args;
  const int taps;
  V x[kConvTile + kMostTaps], y[kConvTile + kMostTaps], out[kConvTile], weight[kMostTaps], bias;

  explicit Convolution(const mmvim::ConvArgs<T>& args) : args(args), taps(int(args.width)) {}

  Window window(const ConvTask<T>& task, int64_t block, int64_t time) const {
    int64_t channel = block * kLanes<T>, left = args.channels - channel;
    int64_t steps = args.length - time;
    return {task.batch, channel, time, int(steps < kConvTile ? steps : kConvTile),
            int(left < kLanes<T> ? left : kLanes<T>)};
  }

  void load_parameters(const Window& w) {
    for (int k = 0; k < taps; k++)
      weight[k] = load_lanes(args.weight + w.channel * taps + k, taps, w.lanes);
    bias = args.bias ? load_lanes(args.bias + w.channel, 1, w.lanes) : V{};
  }

  // x of the window with the taps - 1 steps before it, zeros before time 0.
  void load_input(Window w) {
    int before = taps - 1, missing = w.time < before ? int(before - w.time) : 0;
    for (int t = 0; t < missing; t++) x[t] = V{};
    w.time -= before - missing;
    w.steps += before - missing;
    load_tile(x + missing, args.x, w);
  }

  // The convolution at one step of the window.
  template <int kTaps> MMVIM_INLINE V at(int t) const {
    V sum = bias;
    if (kTaps) {
#pragma GCC unroll 8
      for (int k = 0; k < kTaps; k++) sum = fma(weight[k], x[t + k], sum);
    } else {
      for (int k = 0; k < taps; k++) sum = fma(weight[k], x[t + k], sum);
    }
    return sum;
  }

  template <int kTaps> void forward(const ConvTask<T>& task) {
    for (int64_t time = 0; time < args.length; time += kConvTile)
      for (int64_t block = task.first; block < task.last; block++) {
        Window w = window(task, block, time);
        Window next = block + 1 < task.last ? window(task, block + 1, time)
                                            : window(task, task.first, time + kConvTile);
        Ahead<T> ahead(1);
        ahead.add(args.x, next), ahead.add(args.out, next);
        const SomeLines<T> lines = ahead.share();
        load_parameters(w);
        load_input(w);
        for (int t = 0; t < w.steps; t++) {
          lines.fetch(t);
          V s = at<kTaps>(t);
          out[t] = args.silu ? silu(s) : s;
        }
        store_tile(out, args.out, w);
      }
  }

  // With g the gradient before the activation: ∂x_t = Σ_k w_k g_{t + taps - 1 - k}, so tiles run
  // from the last to the first and hand the first taps - 1 of their g to the one before.
  template <int kTaps> void backward(const ConvTask<T>& task) {
    for (int64_t block = task.first; block < task.last; block++) {
      int64_t last = (args.length - 1) / kConvTile * kConvTile;
      V grad_weight[kMostTaps] = {}, grad_bias{}, later[kMostTaps] = {};
      load_parameters(window(task, block, 0));
      Window w{};
      for (int64_t time = last; time >= 0; time -= kConvTile) {
        w = window(task, block, time);
        load_input(w);
        load_tile(y, args.grad_out, w);
        for (int t = 0; t < w.steps; t++) {
          if (args.silu) {
            V z = at<kTaps>(t), s = sigmoid(z), one = splat(T(1));
            y[t] *= s * fma(z, one - s, one);
          }
          grad_bias += y[t];
#pragma GCC unroll 8
          for (int k = 0; k < (kTaps ? kTaps : taps); k++)
            grad_weight[k] = fma(y[t], x[t + k], grad_weight[k]);
        }
        for (int k = 0; k < taps - 1; k++) y[w.steps + k] = later[k];
        for (int t = 0; t < w.steps; t++) {
          V sum{};
#pragma GCC unroll 8
          for (int k = 0; k < (kTaps ? kTaps : taps); k++)
            sum = fma(weight[k], y[t + (kTaps ? kTaps : taps) - 1 - k], sum);
          out[t] = sum;
        }
        for (int k = 0; k < taps - 1; k++) later[k] = y[k];
        if (args.accumulate) {
          load_tile(x, readable(args.grad_x), w);
          for (int t = 0; t < w.steps; t++) out[t] += x[t];
        }
        store_tile(out, args.grad_x, w);
      }
      int64_t row = task.batch * args.channels + w.channel;
      for (int k = 0; k < taps; k++)
        store_lanes(args.grad_weight + row * taps + k, taps, w.lanes, grad_weight[k]);
      if (args.grad_bias) store_lanes(args.grad_bias + row, 1, w.lanes, grad_bias);
    }
  }
};

template <class T>
void conv_forward(const mmvim::ConvArgs<T>& args, int64_t begin, int64_t end) {
  Convolution<T> convolution(args);
  for (int64_t i = begin; i < end; i++) {
    if (args.width == 4) convolution.template forward<4>(ConvTask<T>(args, i));
    else convolution.template forward<0>(ConvTask<T>(args, i));
  }
}

template <class T>
void conv_backward(const mmvim::ConvArgs<T>& args, int64_t begin, int64_t end) {
  Convolution<T> convolution(args);
  for (int64_t i = begin; i < end; i++) {
    if (args.width == 4) convolution.template backward<4>(ConvTask<T>(args, i));
    else convolution.template backward<0>(ConvTask<T>(args, i));
  }
}

}  // namespace
