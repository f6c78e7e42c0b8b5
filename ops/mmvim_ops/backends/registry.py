"""The registry of backends: what exists, what can run here, and which one computes a call."""

import threading
import warnings

import torch

from ..calls import Call
from . import self_check
from .backend import Backend
from .cpp import CppBackend
from .cuda import CudaBackend
from .torch import TorchBackend
from .triton import TritonBackend

# In order of preference: the first that takes a call computes it.
BACKENDS = {
    backend.name: backend
    for backend in (CppBackend(), CudaBackend(), TritonBackend(), TorchBackend())
}

_warned = set()


class _Selected(threading.local):
    """The names that :class:`use_backend` has set in this thread, the last of which counts."""

    def __init__(self):
        self.names: tuple[str | None, ...] = (None,)


_selected = _Selected()
# Until then nobody reads what a thread has of its own, which torch.compile of torch 2.4 cannot.
_ever_used = False


class use_backend:
    """Context manager: every operation of this library called inside it uses this backend.

    >>> with use_backend('torch'):
    ...     y = selective_scan(u, delta, A, B, C)

    It holds for the thread that enters it, and for no other. ``backend=`` of a call wins over it,
    and the inner of two nested ones wins. The backward pass uses the backend of the forward pass.
    What torch.utils.checkpoint computes again runs with the backend that is selected then, on a GPU
    in another thread: pass ``backend=`` there (:func:`mmvim_ops.mamba_mixer` does so itself).

    torch.compile takes it inside and outside of the function that is compiled. In torch 2.4 the
    graph breaks once it has been used; in 2.13 it does not.

    Args:
        name (str | None): As ``backend`` of :func:`mmvim_ops.selective_scan`; None selects the best
            backend for each call, as outside of it.

    Raises:
        ValueError: The name is unknown, or the backend cannot run on this machine.
    """

    def __init__(self, name: str | None):
        if name is not None:
            reason = _find(name).missing()
            if reason is not None:
                raise ValueError(f'backend {name!r} is not available here: {reason}')
        global _ever_used
        _ever_used = True
        self.name = name

    def __enter__(self) -> None:
        # Kept per thread, as threads may share this object.
        _selected.names = (*_selected.names, self.name)

    def __exit__(self, *_) -> None:
        _selected.names = _selected.names[:-1]


def selected(backend: str | None) -> str | None:
    """The ``backend`` of a public function; for None, that of :class:`use_backend`."""
    return _selected.names[-1] if backend is None and _ever_used else backend


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run on this machine, the preferred ones first."""
    return tuple(name for name, backend in BACKENDS.items() if backend.missing() is None)


def choose_backend(
    name: str | None,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    call: Call | None = None,
) -> Backend:
    """The backend of this name; for None, that of :class:`use_backend`, else the best one.

    One that is not proven yet on this kind of device checks itself first (``self_check.py``).

    Args:
        name (str | None): ``backend`` of a public function.
        device (torch.device | str): Where the input is. A string is a type of device, for which
            nothing is checked.
        dtype (torch.dtype): That of the input.
        call (Call | None): What is to be computed; None asks about device and dtype alone.

    Raises:
        ValueError: The name is unknown, or the backend cannot run here, on this device, in this
            dtype, does not take the call, or failed its check.
    """
    name = selected(name)
    if name is None:
        return _best(device, dtype, call)
    backend = _find(name)
    reason = backend.why_not(_type(device), dtype, call)
    if reason is None:
        reason = self_check.why_not(backend, device, dtype, call)
    if reason is not None:
        raise ValueError(f'backend {name!r} {reason}; backend=None chooses one that takes the call')
    return backend


def _find(name: str) -> Backend:
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f'backend must be None or one of {available_backends()}, got {name!r}')
    return BACKENDS[name]


def _type(device: torch.device | str) -> str:
    return device if isinstance(device, str) else device.type


def _best(device: torch.device | str, dtype: torch.dtype, call: Call | None) -> Backend:
    device_type = _type(device)
    suitable = [
        backend
        for backend in BACKENDS.values()
        if backend.is_default_on(device_type)
        and dtype in backend.dtypes
        and (call is None or backend.limit(call) is None)
    ]
    for backend in suitable:
        if backend.missing() is None:
            reason = self_check.why_not(backend, device, dtype, call)
            if reason is None:
                break
            _warn_once(f'mmvim_ops does not use its backend {backend.name!r}, which {reason}')
    # Warn only when falling back to plain PyTorch.
    if backend is suitable[-1] and len(suitable) > 1:
        reason = suitable[0].missing()
        if reason is not None:
            _warn_once(
                f'mmvim_ops uses its slower backend {backend.name!r}, as {suitable[0].name!r} is '
                f'missing: {reason}'
            )
    return backend


def _warn_once(message: str) -> None:
    if not torch.compiler.is_compiling() and message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=5)
