"""Processes that a launcher started."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

__all__ = ['end_with_launcher']

PR_SET_PDEATHSIG = 1  # of Linux's prctl(2)


def end_with_launcher() -> None:
    """Make the kernel end this process when the torchrun that started it dies, on Linux.

    torchrun starts its workers in sessions of their own. When it is killed and cannot stop them,
    they would train on, write checkpoints beside those of a resumed training, and hold the GPU.
    Does nothing in a process that torchrun did not start.
    """
    if not sys.platform.startswith('linux') or 'TORCHELASTIC_RUN_ID' not in os.environ:
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != launcher:  # it died before the call
        os.kill(os.getpid(), signal.SIGKILL)
