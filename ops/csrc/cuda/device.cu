// What a caller asks before it makes buffers.
#include <cstddef>
#include <cstring>
#include <type_traits>

#include "launch.h"
#include "scan_backward.h"
// Written by ops/build_interface.py: MMVIM_INTERFACE, and checks that the structures are those of
// mmvim_ops/backends/cuda/structures.py.
#include <mmvim_interface.h>

using namespace mmvim;

// Python reads this from the file before it loads it.
MMVIM_API const char mmvim_interface[] = "mmvim_ops interface " MMVIM_INTERFACE;

MMVIM_API int64_t mmvim_constant(const char* name) {
  if (!strcmp(name, "most_states")) return kMostStates;
  if (!strcmp(name, "conv_steps")) return kConvSteps;
  if (!strcmp(name, "most_taps")) return kMostTaps;
  return -1;
}

// Multiprocessors and the shared memory that a block may have, in bytes.
MMVIM_API const char* mmvim_device_limits(int64_t device, int64_t* limits) {
  return device_limits(device, limits);
}

MMVIM_API int64_t mmvim_most_threads(int64_t states, int64_t lanes, int64_t backward) {
  if (backward)
    return with_shape<true>(states, lanes, [](auto shape) {
      return int64_t(kBackwardThreads<decltype(shape)>);
    });
  return with_shape<false>(states, lanes, [](auto shape) {
    return int64_t(kForwardThreads<decltype(shape)>);
  });
}

MMVIM_API int64_t mmvim_shared_bytes(int64_t states, int64_t lanes, int64_t warps,
                                     int64_t directions, int64_t backward) {
  if (backward)
    return with_shape<true>(states, lanes, [&](auto shape) {
      return 4 * BackwardMemory<decltype(shape)>::floats(warps) * directions;
    });
  return with_shape<false>(states, lanes, [&](auto shape) {
    return forward_bytes<decltype(shape), 2>(warps, directions);
  });
}
