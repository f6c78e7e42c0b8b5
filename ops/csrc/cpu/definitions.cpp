// Defines the operators, so that a program without Python that loads the library has them. Python
// adds what only tracing and training need: shapes and gradients.
#include <torch/library.h>

#include "mmvim_schemas.h"   // ops/build_interface.py writes it from mmvim_ops/backends/schemas.py

TORCH_LIBRARY_FRAGMENT(mmvim_ops, m) {
  for (const char* schema : kSchemas) m.def(schema, {at::Tag::pt2_compliant_tag});
}
