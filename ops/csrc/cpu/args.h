// What the kernels are told: plain pointers, strides in elements, sizes. No torch here.
//
// A scan from the last time step to the first is an ordinary one whose pointers start at the last
// step and whose time strides are negative, so that no kernel knows about direction. Python asks
// for the constants (interface.cpp).
#pragma once
#include <cstdint>

namespace mmvim {

// (batch, channels, length); data is null where the argument was not given.
template <class T> struct Sequence {
  T* data;
  int64_t batch, channel, time;
};

// B or C: (batch, groups, states, length) where `varying`, else (channels, states).
template <class T> struct Matrix {
  const T* data;
  int64_t batch, group, channel, state, time;
  bool varying;
};

// What is done with y = C·h + D u once it is known.
enum class Finish {
  kGate,        // one direction: out = y silu(z) scale
  kKeep,        // first of two: out = y, to be added to
  kAddAndGate,  // second of two: out = (out + y) silu(z) scale
};

template <class T> struct ScanArgs {
  int64_t batch, channels, length, states, groups;
  int64_t splits;            // tasks that share the channels of one group
  Sequence<const T> u, delta, z;
  Matrix<T> B, C;
  const T *A, *D, *delta_bias;   // contiguous; (channels, states), (channels), (channels)
  bool softplus;
  T scale;
  Finish finish;

  Sequence<T> out;           // backward writes it only if it gates, and unless null
  const T* first_state;      // (batch, channels, states) or null for zeros
  T* last_state;             // the same or null, forward only; may be first_state
  T* checkpoints;            // (batch, segments - 1, states, channels): h after each segment but the
                             // last; written by forward unless null, read by backward

  // backward only; sums over batch and splits are left to the caller
  Sequence<const T> grad_out;
  const T* grad_last_state;  // (batch, channels, states) or null for zeros
  T* grad_first_state;       // the same or null; may be grad_last_state
  Sequence<T> grad_u, grad_delta;
  Sequence<T> grad_z;        // under kKeep and kAddAndGate it carries y between the directions
  T *grad_A;                 // (batch, channels, states)
  T *grad_D, *grad_delta_bias;   // (batch, channels)
  T *grad_B, *grad_C;        // varying: (splits, batch, groups, length, states), else as grad_A
  int64_t grad_time;         // stride of time in grad_B and grad_C: ± states
};

// Steps between two checkpoints.
constexpr int64_t kSegment = 160;
// Of a convolution.
constexpr int kMostTaps = 8;

template <class T> struct ConvArgs {
  int64_t batch, channels, length, width, splits;
  Sequence<const T> x;
  const T *weight, *bias;    // (channels, width), (channels) or null
  bool silu;
  Sequence<T> out;           // forward only

  // backward only
  Sequence<const T> grad_out;
  Sequence<T> grad_x;
  bool accumulate;               // add to grad_x
  T *grad_weight, *grad_bias;    // (batch, channels, width), (batch, channels)
};

// y = x weightᵀ + bias of `rows` rows; each factor is contiguous in one of its dimensions.
template <class T> struct ProductArgs {
  int64_t rows, in, out;
  const T* x;                // (rows, in)
  int64_t x_row, x_in;
  const T* weight;           // (out, in)
  int64_t weight_out, weight_in;
  const T* bias;             // (out) or null
  T* y;                      // (rows, out)
  int64_t y_row;
  bool accumulate;           // add to y; the bias is left out then
  int64_t chunks;            // of rows; tasks are their number times that of panels
};

// The root mean square norm of rows, all contiguous.
template <class T> struct NormArgs {
  int64_t channels;
  const T *x, *weight;       // (rows, channels), (channels)
  T eps;
  T* y;                      // (rows, channels)
};

// The kernels of one instruction set. Each runs the tasks [begin, end) in the given scratch memory.
template <class T> struct Kernels {
  int lanes;
  int64_t (*scan_scratch)(const ScanArgs<T>&, bool backward);
  void (*scan_forward)(const ScanArgs<T>&, int64_t begin, int64_t end, char* scratch);
  void (*scan_backward)(const ScanArgs<T>&, int64_t begin, int64_t end, char* scratch);
  void (*conv_forward)(const ConvArgs<T>&, int64_t begin, int64_t end);
  void (*conv_backward)(const ConvArgs<T>&, int64_t begin, int64_t end);
  void (*norm)(const NormArgs<T>&, int64_t begin, int64_t end);
  int64_t (*product_panels)(int64_t out);
  int64_t (*product_scratch)(int64_t in);
  void (*product)(const ProductArgs<T>&, int64_t begin, int64_t end, char* scratch);
};

// Products of bfloat16 numbers, of which two take the place of one float32: `in` and x's strides
// count pairs. The weights are float32, contiguous, weight_in = 2, and rounded on the way.
struct HalfKernels {
  void (*round)(const float* x, int64_t x_row, int64_t rows, int64_t in, float* pairs);
  int64_t (*scratch)(int64_t in);
  void (*product)(const ProductArgs<float>&, int64_t begin, int64_t end, char* scratch);
};

struct InstructionSet {
  const char* name;
  Kernels<float> single;
  Kernels<double> twice;     // double precision
};

}  // namespace mmvim
