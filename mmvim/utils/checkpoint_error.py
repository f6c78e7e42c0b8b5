"""The error for checkpoints; a module of its own, as all that read them need it."""

import os

__all__ = ['CheckpointError', 'damaged']


class CheckpointError(ValueError):
    """A checkpoint that cannot or must not be loaded; the message is meant for the user."""


def damaged(name: str, filename: str, reason: str) -> CheckpointError:
    """The error for a file that cannot be read, whatever is in it."""
    size = os.path.getsize(filename)
    return CheckpointError(
        f'checkpoint {name} cannot be read: it is not a complete checkpoint ({size} bytes; '
        f'{reason}). Was its download or its training cut short?'
    )
