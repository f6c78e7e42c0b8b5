// What a caller passes: addresses, strides in elements, sizes. Every field is eight bytes wide, so
// that nothing is padded. mmvim_ops/backends/cuda/structures.py has the same structures, which the
// build checks; for the constants Python asks (device.cu).
#pragma once
#include <cstdint>

namespace mmvim {

// (batch, channels, length); data is null where the argument was not given.
struct Sequence {
  void* data;
  int64_t batch, channel, time;
};

// B or C: (batch, groups, states, length) where `varying`, else (channels, states).
struct Matrix {
  const void* data;
  int64_t varying, batch, group, channel, state, time;
};

// One scan through the sequence. Floats are contiguous; chunks and segments are those of Scan.
struct Direction {
  int64_t reverse;
  Sequence u, delta;
  Matrix B, C;
  const float *A, *D, *delta_bias;   // (channels, states), (channels), (channels)
  float* last_state;                 // (batch, channels, states) or null
  float* checkpoints;                // (batch, segments, states, channels) or null

  // backward
  const float* grad_last_state;      // (batch, channels, states) or null
  Sequence grad_u, grad_delta;
  float *grad_B, *grad_C;   // varying: (batch, groups, splits, length, states), else as grad_A
  float* grad_A;                     // (batch, chunks, states, channels)
  float *grad_D, *grad_delta_bias;   // (batch, chunks, channels)
};

// One or two directions that share a gate: out = (sum of y) silu(z) scale.
struct Scan {
  int64_t dtype, device, stream;
  int64_t batch, channels, length, states, groups, directions, softplus;
  int64_t chunks, chunk_length;      // the length is cut into chunks that run side by side
  int64_t warps;                     // of a block, per direction; sixteen of all at most
  int64_t lanes;                     // that share a channel, where there are at most 16 states
  int64_t splits;                    // backward: blocks that share the channels of a group
  double scale;
  Sequence z, out;
  Sequence partial;   // with two directions: float, what the one that comes first leaves the other
  Sequence grad_out, grad_z;         // backward
  float* ends;        // with several chunks: (directions, batch, chunks, states, channels)
  float* sums;        // with several chunks: (directions, batch, chunks, channels)
  Direction direction[2];
};

// Where a sum goes to, contiguous in this dtype; data is null where it is not wanted.
struct Gradient {
  void* data;
  int64_t dtype;
};

// The sums over what backward leaves in `grad_B` … `grad_delta_bias` of a direction.
struct Totals {
  Gradient B, C;      // varying: (batch, groups, length, states), else (channels, states)
  Gradient A;                        // (channels, states)
  Gradient D, delta_bias;            // (channels)
};

// A second convolution of x; weight is null where there is none.
struct SecondFilter {
  int64_t reverse;
  Sequence out;
  const float *weight, *bias;        // as in Convolution
};

struct Convolution {
  int64_t dtype, device, stream;
  int64_t batch, channels, length, taps, silu, reverse;
  Sequence x, out;
  const float *weight, *bias;        // (channels, taps), (channels) or null

  // backward
  Sequence grad_out, grad_x;
  float* partial;                    // (batch, tiles, taps + 1, channels): of weight and bias
  Gradient grad_weight, grad_bias;   // (channels, taps), (channels)

  SecondFilter second;               // forward only
};

constexpr int kSegment = 64;    // between two checkpoints; chunks are multiples of it
constexpr int kMostStates = 256;
constexpr int kConvSteps = 64;  // of a tile of the convolution
constexpr int kMostTaps = 32;

}  // namespace mmvim
