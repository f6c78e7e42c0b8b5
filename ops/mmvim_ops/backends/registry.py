"""The registry of backends: what exists, what can run here, and which one a device gets."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..checks import FLOATS
from .cpp import operators as cpp
from .cuda import operators as cuda
from .torch import conv1d as torch_conv
from .torch import scan as torch_scan
from .triton import operators as triton


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
            ``out``, where both directions are ``(u, delta, A, B, C, D, delta_bias)``. Where it is
            None or returns None: two scans.
        conv1d (Callable): ``(x, weight, bias, silu, reverse)`` to ``out``.
        scan_block (Callable | None): ``(out, state, direction, z, delta_softplus, reverse,
            accumulate, scale)``, in place; see :func:`mmvim_ops.scan_block_`. None: made of
            ``scan``.
        only_by_name_on (tuple[str, ...]): Device types that it is never the default for, as it
            runs there for tests.
        dtypes (tuple[torch.dtype, ...]): What ``u`` may be.
    """

    name: str
    device_types: tuple[str, ...] | None
    missing: Callable[[], str | None]
    scan: Callable
    bidirectional_scan: Callable | None = None
    conv1d: Callable = torch_conv.conv1d
    scan_block: Callable | None = None
    only_by_name_on: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = FLOATS

    def runs_on(self, device_type: str) -> bool:
        return self.device_types is None or device_type in self.device_types

    def is_for(self, device_type: str, dtype: torch.dtype) -> bool:
        """Whether it may be the default."""
        wanted = self.runs_on(device_type) and device_type not in self.only_by_name_on
        return wanted and dtype in self.dtypes


# In order of preference: the first that is present and runs on the device is the default.
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            'cpp',
            ('cpu',),
            lambda: cpp.MISSING,
            cpp.scan,
            cpp.bidirectional_scan,
            cpp.conv1d,
            cpp.scan_block,
        ),
        Backend(
            'cuda',
            ('cuda',),
            cuda.missing,
            cuda.scan,
            cuda.bidirectional_scan,
            cuda.conv1d,
            only_by_name_on=('cpu',),  # where tests emulate it
            dtypes=tuple(cuda.DTYPES),
        ),
        Backend(
            'triton',
            ('cpu', 'cuda') if triton.INTERPRETED else ('cuda',),
            triton.missing,
            triton.scan,
            only_by_name_on=('cpu', 'cuda') if triton.INTERPRETED else (),
        ),
        Backend('torch', None, lambda: None, torch_scan.scan),
    )
}

_warned = set()


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run on this machine, the preferred ones first."""
    return tuple(name for name, backend in BACKENDS.items() if backend.missing() is None)


def choose_backend(
    name: str | None, device_type: str, dtype: torch.dtype = torch.float32
) -> Backend:
    """The backend of this name, or the best one for the device and dtype where ``name`` is None.

    Raises:
        ValueError: The name is unknown, or the backend cannot run here, on this device or in this
            dtype.
    """
    if name is None:
        suitable = [b for b in BACKENDS.values() if b.is_for(device_type, dtype)]
        chosen = next(backend for backend in suitable if backend.missing() is None)
        # Kernels, whichever, are no reason to nag; plain PyTorch in their place is.
        if chosen is suitable[-1] and len(suitable) > 1 and not torch.compiler.is_compiling():
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
    if dtype not in backend.dtypes:
        raise ValueError(
            f'backend {name!r} takes {", ".join(map(str, backend.dtypes))}, but u is {dtype}; '
            "backend 'torch' takes it on every device"
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
