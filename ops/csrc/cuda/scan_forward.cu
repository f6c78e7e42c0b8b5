// Entry point of the scan, forward.
#include "launch.h"
#include "scan_forward.h"

using namespace mmvim;

namespace {

struct Forward {
  static constexpr bool kBackward = false;
  const Scan& scan;
  template <class T, class Shape, bool kConstant> const char* run() const {
    const int64_t blocks = scan.batch * scan.chunks * scan.groups
        * blocks_per_group(scan, scan.warps * Shape::kChannels);
    if (scan.chunks > 1)
      if (const char* error = find_starts<T, Shape, kConstant, false>(scan)) return error;
    return launch(scan_forward<T, Shape, kConstant>, blocks, int(32 * scan.warps * scan.directions),
                  forward_bytes<Shape, 2>(scan.warps, scan.directions), scan.stream, scan);
  }
};

}  // namespace

MMVIM_API const char* mmvim_scan_forward(const Scan* scan) { return choose(*scan, Forward{*scan}); }
