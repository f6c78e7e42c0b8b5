"""The compiled kernels of ``csrc/cpu``: loads the library and tells torch of its operators.

The library defines the operators of ``backends/schemas.py`` and registers their kernels when it is
loaded, by Python or by any other program that has torch.
"""

import ctypes
import os
from pathlib import Path

import torch

from ...memory import is_tuned, keep_freed_memory
from .. import compiled, operators, schemas

LIBRARY = Path(__file__).parents[2] / '_cpp.so'
BUILD_COMMAND = 'pip install --no-build-isolation --no-deps --force-reinstall -e ./ops'
OPERATIONS = ('scan', 'bidirectional_scan', 'conv1d')
INSTRUCTION_SETS = ('avx512', 'avx2', 'portable')
ISA = 'MMVIM_OPS_ISA'

CONSTANTS: dict[str, int] = {}  # of the library: segment, most_taps


def _load(path: Path) -> str | None:
    """Load the library; returns what is wrong where that fails."""
    reason = compiled.why_not(path, schemas.library_interface(torch.__version__), BUILD_COMMAND)
    if reason is not None:
        return reason
    try:
        torch.ops.load_library(str(path))
        function = ctypes.CDLL(str(path)).mmvim_cpp_constant
        CONSTANTS.update(compiled.constants(function, ('segment', 'most_taps')))
    except (OSError, RuntimeError, AttributeError) as error:
        cause = error.__cause__ or error
        return f'its library does not load ({cause}); compile it again: {BUILD_COMMAND}'
    return None


def saved_states(length):
    """Between segments: as many as there are, less one."""
    return torch.sym_max(length - 1, 0) // CONSTANTS['segment']


def wanted_instruction_set(wanted: str | None, missing: str | None, present: list[str]) -> str:
    """What ``MMVIM_OPS_ISA`` asks for; '' for the best.

    Args:
        wanted (str | None): Value of the variable.
        missing (str | None): Why there is no library.
        present (list[str]): Instruction sets of this processor.

    Raises:
        ValueError: It is unknown or cannot run here.
    """
    if not wanted:
        return ''
    if wanted not in INSTRUCTION_SETS:
        raise ValueError(f'{ISA} must be one of {", ".join(INSTRUCTION_SETS)}, got {wanted!r}')
    if missing is not None:
        raise ValueError(f"{ISA}={wanted} needs backend 'cpp', which is missing: {missing}")
    if wanted not in present:
        raise ValueError(f'{ISA}={wanted}: this processor can run {", ".join(present)} only')
    return wanted


def instruction_sets() -> list[str]:
    """Those that this processor can run, the best first."""
    return torch.ops.mmvim_ops.cpp_instruction_sets() if MISSING is None else []


TUNED = is_tuned()  # also of what the library reads when it is loaded
MISSING = _load(LIBRARY)
_wanted = wanted_instruction_set(os.environ.get(ISA), MISSING, instruction_sets())
if MISSING is None:
    torch.ops.mmvim_ops.cpp_instruction_set(_wanted)
    if TUNED:
        keep_freed_memory()
    kinds = [*OPERATIONS, *(f'{name}_backward' for name in OPERATIONS), 'scan_segment']
    operators.define('cpp', dict.fromkeys(kinds), saved_states)
