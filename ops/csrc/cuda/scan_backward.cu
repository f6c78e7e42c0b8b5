// Entry point of the scan, backward.
#include "launch.h"
#include "scan_backward.h"

using namespace mmvim;

namespace {

struct Backward {
  static constexpr bool kBackward = true;
  const Scan& scan;
  template <class T, class Shape, bool kConstant> const char* run() const {
    if (scan.chunks > 1)
      if (const char* error = find_starts<T, Shape, kConstant, true>(scan)) return error;
    return launch(scan_backward<T, Shape, kConstant>,
                  scan.batch * scan.chunks * scan.groups * scan.splits,
                  int(32 * scan.warps * scan.directions),
                  4 * BackwardMemory<Shape>::floats(scan.warps) * scan.directions, scan.stream, scan);
  }
};

}  // namespace

MMVIM_API const char* mmvim_scan_backward(const Scan* scan) {
  return choose(*scan, Backward{*scan});
}
