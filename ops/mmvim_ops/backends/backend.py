"""What a backend is: the one class that every folder beside this file derives from."""

import torch
from torch import Tensor

from ..calls import BidirectionalCall, Call, Conv1dCall, MixerCall, ScanCall, SegmentCall
from ..checks import FLOATS
from . import composed


class Backend:
    """One implementation of the operations. It gets checked arguments.

    A backend has a scan and a convolution of its own. The other operations are composed of that
    scan unless it has kernels for them. It never calls another backend.

    Attributes:
        name (str): What users pass as ``backend``.
        device_types (tuple[str, ...] | None): Device types it runs on; None for all.
        only_by_name_on (tuple[str, ...]): Device types that it is never the default for.
        dtypes (tuple[torch.dtype, ...]): What the input may be.
        checks_itself_on (tuple[str, ...]): Device types on which it is not proven yet. There
            ``self_check.py`` compares it with the specification before it first computes a call.
    """

    name: str
    device_types: tuple[str, ...] | None = None
    only_by_name_on: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = FLOATS
    checks_itself_on: tuple[str, ...] = ()

    def missing(self) -> str | None:
        """Why it cannot run on this machine; None where it can."""
        return None

    def limit(self, call: Call) -> str | None:
        """What of a call its kernels do not take; None where they take it."""
        return None

    def scan(self, call: ScanCall) -> tuple[Tensor, Tensor]:
        """The output and the last state."""
        raise NotImplementedError

    def conv1d(self, call: Conv1dCall) -> Tensor:
        raise NotImplementedError

    def bidirectional_scan(self, call: BidirectionalCall) -> Tensor:
        return composed.bidirectional_scan(self.scan, call)

    def scan_segment_(self, call: SegmentCall) -> None:
        composed.scan_segment_(self.scan, call)

    def mamba_mixer(self, call: MixerCall) -> Tensor | None:
        """The output, by a kernel for the whole mixer; None where the mixer is composed of the
        other operations."""
        return None

    def runs_on(self, device_type: str) -> bool:
        return self.device_types is None or device_type in self.device_types

    def is_default_on(self, device_type: str) -> bool:
        return self.runs_on(device_type) and device_type not in self.only_by_name_on

    def why_not(self, device_type: str, dtype: torch.dtype, call: Call | None = None) -> str | None:
        """Why it does not compute a call of this device and dtype; None where it does."""
        reason = self.missing()
        if reason is not None:
            return f'is not available here: {reason}'
        if not self.runs_on(device_type):
            return f'runs on {" and ".join(self.device_types)}, but the input is on {device_type}'
        if dtype not in self.dtypes:
            return f'takes {", ".join(map(str, self.dtypes))}, but the input is {dtype}'
        return None if call is None else self.limit(call)
