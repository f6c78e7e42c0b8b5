// From what a caller asks for to the kernel that was compiled for it.
#pragma once
#include "scan_common.h"

#define MMVIM_API extern "C" __attribute__((visibility("default")))

namespace mmvim {

// Up to 16 states a warp has 16 channels; more states than that are rare, and get one type only.
using Small = Shape<4, 4, 2>;
using Medium = Shape<16, 4, 2>;
using Large = Shape<32, 8, 1>;

// What mmvim_ops/backends/cuda has to know to make buffers: the channels of a warp.
inline int64_t channels_per_warp(int64_t states) {
  return states <= Small::kStates ? Small::kChannels
      : states <= Medium::kStates ? Medium::kChannels : Large::kChannels;
}

// task.run<element type, shape, whether B or C may be constant>() on the right device.
template <class Task> const char* choose(const Scan& scan, const Task& task) {
  if (const char* error = use_device(scan.device)) return error;
  bool constant = false;
  for (int64_t i = 0; i < scan.directions; i++)
    constant |= !scan.direction[i].B.varying || !scan.direction[i].C.varying;
  if (scan.states <= Small::kStates && !constant) {
    if (scan.dtype == kBfloat16) return task.template run<__nv_bfloat16, Small, false>();
#ifdef MMVIM_ONLY_BFLOAT16      // a quick look at what the compiler makes of the kernels
  }
  return "compiled for bfloat16 only";
#else
    if (scan.dtype == kFloat16) return task.template run<__half, Small, false>();
    if (scan.dtype == kFloat32) return task.template run<float, Small, false>();
  }
  if (scan.dtype != kFloat32) return "constant matrices and more than 16 states need float32";
  if (scan.states <= Small::kStates) return task.template run<float, Small, true>();
  if (scan.states <= Medium::kStates) return task.template run<float, Medium, true>();
  if (scan.states <= Large::kStates) return task.template run<float, Large, true>();
  return "too many states";
#endif
}

}  // namespace mmvim
