"""Backend 'torch': plain PyTorch, on every device."""

from ..backend import Backend
from . import conv1d, scan


class TorchBackend(Backend):
    """Needs nothing but PyTorch. It takes every call."""

    name = 'torch'

    def scan(self, call):
        return scan.scan(call)

    def conv1d(self, call):
        return conv1d.conv1d(call)
