"""Peak memory of a process, and words for the machine that was measured."""

from __future__ import annotations

import ctypes
import gc
import platform
import subprocess
from pathlib import Path

import torch

__all__ = ['PeakMemory', 'mebibytes', 'processor', 'read_bytes']

PROC = Path('/proc')


class PeakMemory:
    """Bytes in use on a device, and the most since :meth:`reset`.

    On a GPU what torch allocated; on the CPU what the process has in memory, which only Linux both
    tells and lets one start anew: elsewhere both are None.
    """

    def __init__(self, device: str) -> None:
        self.device = device

    def reset(self) -> int | None:
        """Start anew; returns what is in use now."""
        gc.collect()
        if self.device == 'cuda':
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        if not PROC.exists():
            return None
        # Freed memory goes back to the kernel; other C libraries than glibc have no such function.
        getattr(ctypes.CDLL(None), 'malloc_trim', lambda _: None)(0)
        try:
            (PROC / 'self/clear_refs').write_text('5')  # VmHWM := VmRSS
        except OSError:  # a container that does not allow it
            return None
        return self.status('VmRSS')

    def peak(self) -> int | None:
        if self.device == 'cuda':
            return torch.cuda.max_memory_allocated()
        return self.status('VmHWM')

    @staticmethod
    def status(key: str) -> int | None:
        """Bytes that Linux names ``key`` in the status of this process; elsewhere None."""
        path = PROC / 'self/status'
        return read_bytes(path, key) if path.exists() else None


def read_bytes(path: Path, key: str) -> int:
    """What a file of Linux's /proc gives in kB in the line ``key:``, in bytes."""
    lines = path.read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f'{key}:'))


def mebibytes(count: int | None) -> str:
    """A number of bytes in words, known or not."""
    return f'{platform.system()} does not tell' if count is None else f'{count / 2**20:.0f} MiB'


def processor(device: str) -> str:
    if device == 'cuda':
        return torch.cuda.get_device_name()
    return f'{cpu_name()}, {torch.get_num_threads()} threads'


def cpu_name() -> str:
    """The processor's name as the system gives it; its architecture where it gives none."""
    if platform.system() == 'Darwin':
        command = ['sysctl', '-n', 'machdep.cpu.brand_string']
        name = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    elif (PROC / 'cpuinfo').exists():
        lines = (PROC / 'cpuinfo').read_text().splitlines()
        names = (line.partition(':')[2].strip() for line in lines if line.startswith('model name'))
        name = next(names, '')
    else:
        name = platform.processor()
    return name or platform.machine() or 'CPU'
