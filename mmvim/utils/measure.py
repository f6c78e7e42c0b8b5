"""Peak memory of a process, and words for the machine that was measured."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

__all__ = ['PeakMemory', 'processor', 'read_bytes']

STATUS = Path('/proc/self/status')


class PeakMemory:
    """Bytes in use on a device, and the most since :meth:`reset`.

    On a GPU what torch allocated; on the CPU what the process has in memory, which Linux alone
    tells: elsewhere both are None.
    """

    def __init__(self, device: str) -> None:
        self.device = device

    def reset(self) -> int | None:
        """Start anew; returns what is in use now."""
        gc.collect()
        if self.device == 'cuda':
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        if not STATUS.exists():
            return None
        ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back to the kernel
        STATUS.with_name('clear_refs').write_text('5')  # VmHWM := VmRSS
        return self.status('VmRSS')

    def peak(self) -> int | None:
        if self.device == 'cuda':
            return torch.cuda.max_memory_allocated()
        return self.status('VmHWM') if STATUS.exists() else None

    @staticmethod
    def status(key: str) -> int:
        """Bytes that Linux names ``key`` in the status of this process."""
        return read_bytes(STATUS, key)


def read_bytes(path: Path, key: str) -> int:
    """What a file of Linux's /proc gives in kB in the line ``key:``, in bytes."""
    lines = path.read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f'{key}:'))


def processor(device: str) -> str:
    if device == 'cuda':
        return torch.cuda.get_device_name()
    lines = Path('/proc/cpuinfo').read_text().splitlines()
    name = next((line.split(': ')[1] for line in lines if line.startswith('model name')), 'CPU')
    return f'{name}, {torch.get_num_threads()} threads'
