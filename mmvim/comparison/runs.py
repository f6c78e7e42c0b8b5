"""Runs of a comparison: each in a folder of its own, finished ones kept, stopped ones resumed."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

import mmvim
from mmvim.utils.errors import UserError
from mmvim.utils.measure import cpu_name

__all__ = ['about', 'call', 'read_result', 'scalars', 'write_result']


def read_result(folder: Path, options: Sequence[str]) -> dict | None:
    """What :func:`write_result` left in the folder of a run; None if it did not finish.

    Raises:
        UserError: The run had other options.
    """
    try:
        result = json.loads((folder / 'result.json').read_text())
    except (FileNotFoundError, ValueError):
        return None
    if result['options'] != list(options):
        raise UserError(
            f'{folder} was trained with {shlex.join(result["options"])}: choose another --work-dir'
        )
    return result


def write_result(folder: Path, options: Sequence[str], **result) -> dict:
    """Mark a run as finished, all of the file or nothing; what :func:`read_result` returns."""
    result = dict(options=list(options), **result)
    partial = folder / 'result.json.partial'
    partial.write_text(json.dumps(result) + '\n')
    partial.replace(folder / 'result.json')
    return result


def call(command: Sequence[str], log: Path, root: Path, threads: int | None = None) -> None:
    """Run a Python tool from ``root``, shown in the terminal, its output added to ``log``.

    ``threads`` are those of its computations on the CPU (None: torch's own choice).

    Raises:
        UserError: It failed.
    """
    print(f'\npython {shlex.join(command)}', flush=True)
    command = [sys.executable, *command]
    env = None if threads is None else {**os.environ, 'OMP_NUM_THREADS': str(threads)}
    with log.open('a') as output:
        code = subprocess.call(command, cwd=root, env=env, stdout=output, stderr=output)
    if code:
        raise UserError(f'exit code {code}; see the end of {log}')


def scalars(folder: Path, key: str) -> dict[int, float]:
    """Step: value of a quantity that the sessions of a training logged; the last one counts."""
    found = {}
    for log in sorted(folder.glob('*/vis_data/scalars.json')):
        for line in log.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # a kill left half a line
                continue
            if key in entry:
                found[int(entry['step'])] = float(entry[key])
    return dict(sorted(found.items()))


def about(threads: int | None = None) -> dict:
    """Versions, machine and date, which belong to a result; ``threads`` are those of a run."""
    return dict(
        mmvim=mmvim.__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        processor=torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        threads=threads or torch.get_num_threads(),
        date=date.today().isoformat(),
    )
