"""What the compiled libraries have in common: whether a file fits to this code, its constants."""

import ctypes
import mmap
from pathlib import Path

# Precedes the interface in a library: csrc/*/interface.*, written by ops/build_interface.py.
MARK = b'mmvim_ops interface '


def interface_of(library: Path) -> str | None:
    """What the file says of the interface it was compiled for; it is not loaded."""
    if library.stat().st_size == 0:
        return None
    with library.open('rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = data.find(MARK)
        if start < 0:
            return None
        start += len(MARK)
        return data[start : data.find(b'\0', start)].decode(errors='replace')


def why_not(library: Path, interface: str, command: str) -> str | None:
    """What keeps the file from being loaded; None where nothing is known to."""
    if not library.exists():
        return f'it is not compiled; in the source tree, run: {command}'
    found = interface_of(library)
    if found != interface:
        return (
            f'its library was compiled for another version ({found}) than this one ({interface}); '
            f'compile it again: {command}'
        )
    return None


def constants(function, names: tuple[str, ...]) -> dict[str, int]:
    """What the library calls these constants.

    Args:
        function: The library's ``int64_t f(const char* name)``, -1 for an unknown name.
        names (tuple[str, ...]): Which ones.
    """
    function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int64
    found = {name: function(name.encode()) for name in names}
    unknown = [name for name, value in found.items() if value < 0]
    if unknown:
        raise AttributeError(f'it has no constant {", ".join(unknown)}')
    return found
