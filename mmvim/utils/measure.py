"""Peak memory of a process, and words for the machine that was measured."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

__all__ = ['PeakMemory', 'processor']


class PeakMemory:
    """Bytes in use on a device, and the most since :meth:`reset`."""

    def __init__(self, device: str) -> None:
        self.device = device

    def reset(self) -> int:
        """Start anew; returns what is in use now."""
        gc.collect()
        if self.device == 'cuda':
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back to the kernel
        Path('/proc/self/clear_refs').write_text('5')  # VmHWM := VmRSS
        return self._status('VmRSS')

    def peak(self) -> int:
        if self.device == 'cuda':
            return torch.cuda.max_memory_allocated()
        return self._status('VmHWM')

    @staticmethod
    def _status(key: str) -> int:
        lines = Path('/proc/self/status').read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def processor(device: str) -> str:
    if device == 'cuda':
        return torch.cuda.get_device_name()
    lines = Path('/proc/cpuinfo').read_text().splitlines()
    name = next((line.split(': ')[1] for line in lines if line.startswith('model name')), 'CPU')
    return f'{name}, {torch.get_num_threads()} threads'
