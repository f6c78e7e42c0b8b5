"""Backend 'cuda': kernels for NVIDIA GPUs that are compiled when the package is installed."""

from ...calls import BidirectionalCall, Call, Conv1dCall
from .. import composed, operators
from ..backend import Backend
from . import conv1d, library, mixer, scan


class CudaBackend(Backend):
    """CUDA C++; computes in float32.

    It has kernels for the scan, for two directions of up to 64 states at once (with more it is two
    scans) and for convolutions of up to 32 taps. A scan has up to 256 states.
    """

    name = 'cuda'
    device_types = ('cuda',)
    only_by_name_on = ('cpu',)  # where tests emulate it
    dtypes = tuple(library.DTYPES)
    checks_itself_on = ('cuda',)

    def missing(self):
        return library.missing()

    def limit(self, call: Call):
        if self.missing() is not None:
            return None
        if isinstance(call, Conv1dCall):
            return operators.taps_limit(call, library.CONSTANTS['most_taps'])
        if isinstance(call, BidirectionalCall):
            states = max(call.forward.A.shape[1], call.backward.A.shape[1])
        else:
            states = call.direction.A.shape[1]
        most = library.CONSTANTS['most_states']
        return f'takes at most {most} states, but A has {states}' if states > most else None

    def scan(self, call):
        return operators.scan('cuda', call)

    def bidirectional_scan(self, call):
        fitting = scan.fit_into_one_launch(call)
        if fitting is None:
            return composed.bidirectional_scan(self.scan, call)
        return operators.bidirectional_scan('cuda', fitting)

    def conv1d(self, call):
        return operators.conv1d('cuda', call)

    def mamba_mixer(self, call):
        return mixer.mamba_mixer(call) if mixer.why_not(call) is None else None


operators.define('cuda', scan.IMPLEMENTATIONS | conv1d.IMPLEMENTATIONS, scan.saved_states)
