// What mmvim_ops/backends/cpp/library.py asks of the library. No torch here.
#include <cstring>

#include "args.h"

#define MMVIM_API extern "C" __attribute__((visibility("default")))

// Python reads this from the file before it loads it. MMVIM_INTERFACE is a hash of the operators'
// schemas, from ops/build_interface.py.
MMVIM_API const char mmvim_cpp_interface[] = "mmvim_ops interface " MMVIM_INTERFACE;

MMVIM_API int64_t mmvim_cpp_constant(const char* name) {
  if (!std::strcmp(name, "segment")) return mmvim::kSegment;      // steps between two saved states
  if (!std::strcmp(name, "most_taps")) return mmvim::kMostTaps;
  return -1;
}
