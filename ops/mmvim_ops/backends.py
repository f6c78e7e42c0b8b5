"""The registry of backends: what exists, what can run here, and which one a device gets."""
from collections.abc import Callable
from dataclasses import dataclass

from . import torch_scan


@dataclass(frozen=True)
class Backend:
    """One implementation of the scan.

    Args:
        name (str): What users pass as ``backend``.
        scan (Callable): ``(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)`` with
            checked arguments to ``(out, last_state)``.
        device_types (tuple[str, ...] | None): Device types it runs on; None for all.
        missing (Callable): Returns why it cannot run on this machine, None where it can.
    """
    name: str
    scan: Callable
    device_types: tuple[str, ...] | None
    missing: Callable[[], str | None]

    def runs_on(self, device_type: str) -> bool:
        return self.device_types is None or device_type in self.device_types


# In order of preference: the first that is present and runs on the device is the default.
BACKENDS = {
    backend.name: backend for backend in (
        Backend('torch', torch_scan.scan, None, lambda: None),
    )
}


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run on this machine, the preferred ones first."""
    return tuple(name for name, backend in BACKENDS.items() if backend.missing() is None)


def choose_backend(name: str | None, device_type: str) -> Backend:
    """The backend of this name, or the best one for the device where ``name`` is None.

    Raises:
        ValueError: The name is unknown, or the backend cannot run here or on this device.
    """
    if name is None:
        return next(backend for backend in BACKENDS.values()
                    if backend.runs_on(device_type) and backend.missing() is None)
    if name not in BACKENDS:
        raise ValueError(f'backend must be None or one of {available_backends()}, got {name!r}')
    backend = BACKENDS[name]
    reason = backend.missing()
    if reason is not None:
        raise ValueError(f'backend {name!r} is not available here: {reason}')
    if not backend.runs_on(device_type):
        raise ValueError(f'backend {name!r} runs on {" and ".join(backend.device_types)}, but u is '
                         f'on {device_type}')
    return backend
