"""The registry of backends: what exists, what can run here, and which one a device gets."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import cpp_backend, torch_conv, torch_scan, triton_backend


@dataclass(frozen=True)
class Backend:
    """One implementation of the operations. All get checked arguments.

    Args:
        name (str): What users pass as ``backend``.
        device_types (tuple[str, ...] | None): Device types it runs on; None for all.
        missing (Callable): Returns why it cannot run on this machine, None where it can.
        scan (Callable): ``(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)`` to
            ``(out, last_state)``.
        bidirectional_scan (Callable | None): ``(forward, backward, z, delta_softplus, scale)`` to
            ``out``, where both directions are ``(u, delta, A, B, C, D, delta_bias)``. None: two
            scans.
        conv1d (Callable): ``(x, weight, bias, silu, reverse)`` to ``out``.
        only_by_name (bool): Never the default: it is there for tests.
    """

    name: str
    device_types: tuple[str, ...] | None
    missing: Callable[[], str | None]
    scan: Callable
    bidirectional_scan: Callable | None = None
    conv1d: Callable = torch_conv.conv1d
    only_by_name: bool = False

    def runs_on(self, device_type: str) -> bool:
        return self.device_types is None or device_type in self.device_types


# In order of preference: the first that is present and runs on the device is the default.
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            'cpp',
            ('cpu',),
            lambda: cpp_backend.MISSING,
            cpp_backend.scan,
            cpp_backend.bidirectional_scan,
            cpp_backend.conv1d,
        ),
        Backend(
            'triton',
            ('cpu', 'cuda') if triton_backend.INTERPRETED else ('cuda',),
            triton_backend.missing,
            triton_backend.scan,
            only_by_name=triton_backend.INTERPRETED,
        ),
        Backend('torch', None, lambda: None, torch_scan.scan),
    )
}

_warned = set()


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run on this machine, the preferred ones first."""
    return tuple(name for name, backend in BACKENDS.items() if backend.missing() is None)


def choose_backend(name: str | None, device_type: str) -> Backend:
    """The backend of this name, or the best one for the device where ``name`` is None.

    Raises:
        ValueError: The name is unknown, or the backend cannot run here or on this device.
    """
    if name is None:
        suitable = [
            backend
            for backend in BACKENDS.values()
            if backend.runs_on(device_type) and not backend.only_by_name
        ]
        chosen = next(backend for backend in suitable if backend.missing() is None)
        if chosen is not suitable[0] and not torch.compiler.is_compiling():
            _warn_once(suitable[0], chosen)
        return chosen
    if name not in BACKENDS:
        raise ValueError(f'backend must be None or one of {available_backends()}, got {name!r}')
    backend = BACKENDS[name]
    reason = backend.missing()
    if reason is not None:
        raise ValueError(f'backend {name!r} is not available here: {reason}')
    if not backend.runs_on(device_type):
        raise ValueError(
            f'backend {name!r} runs on {" and ".join(backend.device_types)}, but u is '
            f'on {device_type}'
        )
    return backend


def _warn_once(better: Backend, chosen: Backend) -> None:
    if better.name not in _warned:
        _warned.add(better.name)
        warnings.warn(
            f'mmvim_ops uses its slower backend {chosen.name!r}, as {better.name!r} is '
            f'missing: {better.missing()}',
            stacklevel=4,
        )
