"""Backend 'triton': kernels for NVIDIA GPUs that Triton compiles when they first run.

The kernels are imported when they first run: where there is no GPU, Triton costs nothing.
"""

from .. import operators
from ..backend import Backend
from . import conv1d, library, scan


class TritonBackend(Backend):
    """Computes float64 in float64, the rest in float32.

    It has kernels for the scan and the convolution; two directions are two scans.
    """

    name = 'triton'
    device_types = ('cpu', 'cuda') if library.INTERPRETED else ('cuda',)
    only_by_name_on = ('cpu', 'cuda') if library.INTERPRETED else ()
    checks_itself_on = ('cuda',)

    def missing(self):
        return library.missing()

    def scan(self, call):
        return operators.scan('triton', call)

    def conv1d(self, call):
        return operators.conv1d('triton', call)


operators.define('triton', scan.IMPLEMENTATIONS | conv1d.IMPLEMENTATIONS, scan.saved_states)
