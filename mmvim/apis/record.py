"""How far a long piece of work is: for whoever waits for it, and for when it is started again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

__all__ = ['Record', 'Track']

#: A sequence to go through and what is done with it, to the same sequence; rich's ``track`` is one.
Track = Callable[[Sequence, str], Iterable]


class Record:
    """What has been done so far, in a small file; of another picture or size it counts as nothing.

    Args:
        path (Path): The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, *of):
        """What was written last of this, or None."""
        if not self.path.is_file():
            return None
        *found, value = json.loads(self.path.read_text())
        return value if found == json.loads(json.dumps(of)) else None

    def write(self, *content) -> None:
        """Write what this is of and, last, the value."""
        new = self.path.with_suffix('.new')
        new.write_text(json.dumps(content))
        new.replace(self.path)
