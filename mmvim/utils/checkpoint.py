"""Loading checkpoints as weights only, so that a downloaded file cannot run code.

A checkpoint is a pickle, and unpickling can execute anything. ``torch.load(weights_only=True)``
admits tensors, plain containers and an allow-list. mmengine's own training checkpoints also hold
logged scalars (``HistoryBuffer`` and numpy arrays); these few harmless types are all that this
module adds to the list.
"""

from __future__ import annotations

import os
import pickle
from zipfile import BadZipFile

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

__all__ = ['CheckpointError', 'allow_mmengine_checkpoints', 'guard_checkpoints', 'load_from_local']


PLAIN_NUMBERS = (
    *('float16', 'float32', 'float64', 'bool'),
    *(f'{kind}{bits}' for kind in ('int', 'uint') for bits in (8, 16, 32, 64)),
)


class CheckpointError(ValueError):
    """A checkpoint that cannot or must not be loaded; the message is meant for the user."""


def allow_mmengine_checkpoints() -> None:
    """Put the types in mmengine's own training checkpoints on torch's allow-list."""
    multiarray = np._core.multiarray if hasattr(np, '_core') else np.core.multiarray
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            getattr,
            slice,
            np.ndarray,
            np.dtype,
            multiarray._reconstruct,
            multiarray.scalar,
            *(type(np.dtype(name)) for name in PLAIN_NUMBERS),
        ]
    )


def load_from_local(filename: str, map_location: str | None = 'cpu') -> dict:
    """Load a local checkpoint without executing anything in it.

    Args:
        filename (str): Path of the file.
        map_location (str, optional): As in :func:`torch.load`.

    Raises:
        CheckpointError: The file is missing, damaged, or holds more than weights; the message says
            which, and for the last case how to load it nevertheless.
    """
    filename = os.path.expanduser(filename)
    if not os.path.isfile(filename):
        raise CheckpointError(f'checkpoint {filename}: there is no such file')
    try:
        return torch.load(filename, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        if not _is_pickle(filename):
            raise _damaged(filename, error) from None
        raise CheckpointError(
            f'checkpoint {filename} was refused: to load it, Python would have to run code from '
            f'the file ({_first_line(error)}). Weights alone never need that. If you trust where '
            'the file comes from, pass --trust-checkpoint to the command line tools.'
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, BadZipFile) as error:
        raise _damaged(filename, error) from None


def guard_checkpoints(trust: bool = False) -> None:
    """Make every checkpoint that mmengine loads in this process weights only.

    Args:
        trust (bool): True lifts the protection instead: files may then run code.
    """
    if trust:
        os.environ['TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'] = '1'
        return
    # Files from URLs take another way through mmengine, which asks torch for full unpickling.
    os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] = '1'
    CheckpointLoader.register_scheme(prefixes='', loader=load_from_local, force=True)


def _is_pickle(filename: str) -> bool:
    """Whether the file is a checkpoint at all: torch's zip format, or a bare pickle."""
    with open(filename, 'rb') as file:
        start = file.read(2)
    return start == b'PK' or start[:1] == b'\x80'


def _damaged(filename: str, error: Exception) -> CheckpointError:
    size = os.path.getsize(filename)
    return CheckpointError(
        f'checkpoint {filename} cannot be read: it is not a complete torch checkpoint '
        f'({size} bytes; {_first_line(error)}). Was its download or its training cut short?'
    )


def _first_line(error: Exception) -> str:
    """What torch says went wrong, without its advice to switch the protection off."""
    lines = (line.replace('WeightsUnpickler error:', '').strip() for line in str(error).split('\n'))
    reasons = [line for line in lines if line and 'weights_only' not in line]
    return reasons[0].split('. ')[0] if reasons else type(error).__name__
