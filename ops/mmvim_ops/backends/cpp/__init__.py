"""Backend 'cpp': kernels for the CPU that are compiled when the package is installed."""

from ...calls import Call, Conv1dCall
from .. import operators
from ..backend import Backend
from . import library, mixer


class CppBackend(Backend):
    """AVX-512, AVX2 or portable code, chosen at run time; float64 in float64, the rest in float32.

    It has a kernel for every operation, and takes convolutions of up to 8 taps. Under autocast to
    bfloat16 a mixer that needs no gradient multiplies in bfloat16 where that is faster.
    """

    name = 'cpp'
    device_types = ('cpu',)

    def missing(self):
        return library.MISSING

    def limit(self, call: Call):
        if isinstance(call, Conv1dCall) and library.MISSING is None:
            return operators.taps_limit(call, library.CONSTANTS['most_taps'])
        return None

    def scan(self, call):
        return operators.scan('cpp', call)

    def bidirectional_scan(self, call):
        return operators.bidirectional_scan('cpp', call)

    def scan_segment_(self, call):
        operators.scan_segment_('cpp', call)

    def conv1d(self, call):
        return operators.conv1d('cpp', call)

    def mamba_mixer(self, call):
        return mixer.mamba_mixer(call) if mixer.why_not(call) is None else None
