// From what a caller asks for to the kernel that was compiled for it.
#pragma once
#include "scan_common.h"

#define MMVIM_API extern "C" __attribute__((visibility("default")))

namespace mmvim {

// Up to 16 states, the fewer lanes share a channel the less a state costs, and the fewer warps there
// are. In backward two lanes would need more registers than there are. More states than that are
// rare, and get one type only.
using Small2 = Shape<2, 8, 16>;
using Small4 = Shape<4, 4, 16>;
using Small8 = Shape<8, 2, 32>;
using Medium = Shape<16, 4, 16>;
using Large = Shape<32, 8, 16>;

// f(shape) with that of so many states and, where there is a choice, lanes per channel.
template <bool kBackward, class F> auto with_shape(int64_t states, int64_t lanes, F f) {
  if constexpr (!kBackward)
    if (states <= Small2::kStates && lanes == Small2::P) return f(Small2());
  if (states <= Small4::kStates) return lanes == Small4::P ? f(Small4()) : f(Small8());
  return states <= Medium::kStates ? f(Medium()) : f(Large());
}

// task.run<element type, shape, whether B or C may be constant>() on the right device.
template <class Task> const char* choose(const Scan& scan, const Task& task) {
  if (const char* error = use_device(scan.device)) return error;
  if (scan.states > kMostStates) return "too many states";
  bool constant = false;
  for (int64_t i = 0; i < scan.directions; i++)
    constant |= !scan.direction[i].B.varying || !scan.direction[i].C.varying;
  return with_shape<Task::kBackward>(scan.states, scan.lanes, [&](auto shape) -> const char* {
    using Shape = decltype(shape);
    if constexpr (Shape::kStates <= 16)
      if (!constant) {
        if (scan.dtype == kBfloat16) return task.template run<__nv_bfloat16, Shape, false>();
#ifndef MMVIM_ONLY_BFLOAT16      // a quick look at what the compiler makes of the kernels
        if (scan.dtype == kFloat16) return task.template run<__half, Shape, false>();
        if (scan.dtype == kFloat32) return task.template run<float, Shape, false>();
#endif
      }
#ifdef MMVIM_ONLY_BFLOAT16
    return "compiled for bfloat16 only";
#else
    if (scan.dtype != kFloat32) return "constant matrices and more than 16 states need float32";
    return task.template run<float, Shape, true>();
#endif
  });
}

}  // namespace mmvim
