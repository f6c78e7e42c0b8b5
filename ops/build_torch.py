"""Which torch the libraries are compiled for; ``build_ops.py`` calls it."""

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

QUESTION = """
import json, torch
abi = int(torch.compiled_with_cxx11_abi())
print(json.dumps([torch.__path__[0], torch.__version__, abi, torch.version.cuda]))
"""


class Torch(NamedTuple):
    """What compiling needs to know of a torch."""

    folder: str
    version: str
    cxx11_abi: int
    cuda: str | None

    @property
    def minor(self) -> tuple[int, int]:
        """(2, 13) for 2.13.0+cpu. Releases with the same one share their binary interface."""
        major, minor = self.version.split('.')[:2]
        return int(major), int(minor)

    @property
    def include(self) -> str:
        return str(Path(self.folder, 'include'))

    @property
    def libraries(self) -> str:
        return str(Path(self.folder, 'lib'))


@functools.cache
def find_torch() -> Torch | None:
    """The torch of this environment; None where there is none.

    Where pip builds in isolation it puts a folder without torch on PYTHONPATH, and runs the Python
    that it installs for. The second try, without PYTHONPATH, finds the torch of that Python.
    """
    for options in ([], ['-E']):
        command = [sys.executable, *options, '-c', QUESTION]
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.returncode == 0:
            return Torch(*json.loads(answer.stdout.splitlines()[-1]))
    return None
