// All kernels as one table; a source file that includes this is compiled for one instruction set.
#pragma once
#include "conv1d.h"
#include "norm.h"
#include "product.h"
#include "scan_backward.h"

namespace {

template <class T> constexpr mmvim::Kernels<T> kernels() {
  return {kLanes<T>, scan_scratch<T>, scan_forward<T>, scan_backward<T>, conv_forward<T>,
          conv_backward<T>, norm<T>, product_panels<T>, product_scratch<T>, product<T>};
}

}  // namespace
