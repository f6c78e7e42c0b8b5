// What a caller asks before it makes buffers.
#include "launch.h"
#include "scan_backward.h"

using namespace mmvim;

namespace {

template <class Shape> int64_t shared_bytes(int64_t warps, int64_t directions, bool backward) {
  int64_t floats = backward ? BackwardMemory<Shape>::floats(warps)
                            : ForwardMemory<Shape>::floats(warps);
  return 4 * floats * directions;
}

}  // namespace

// Changes whenever the structures do, so that no old library is called with new ones.
MMVIM_API int64_t mmvim_version() { return int64_t(sizeof(Scan) + sizeof(Convolution)); }

// Multiprocessors and the shared memory that a block may have, in bytes.
MMVIM_API const char* mmvim_device_limits(int64_t device, int64_t* limits) {
  return device_limits(device, limits);
}

MMVIM_API int64_t mmvim_channels_per_warp(int64_t states) { return channels_per_warp(states); }

MMVIM_API int64_t mmvim_shared_bytes(int64_t states, int64_t warps, int64_t directions,
                                     int64_t backward) {
  if (states <= Small::kStates) return shared_bytes<Small>(warps, directions, backward);
  if (states <= Medium::kStates) return shared_bytes<Medium>(warps, directions, backward);
  return shared_bytes<Large>(warps, directions, backward);
}
