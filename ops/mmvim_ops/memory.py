"""How the process gets its memory on the CPU.

Loading backend 'cpp' changes two things for the whole process: glibc keeps more freed memory
(:func:`keep_freed_memory`), and the kernels ask for their results in pages of 2 MiB from 4 MiB on
(``in_large_pages`` of ``csrc/cpu/tensors.h``). ``MMVIM_OPS_TUNE_MEMORY=0`` in the environment
switches both off. It is read once, when mmvim_ops is imported.
"""

import torch

from .environment import is_on

SWITCH = 'MMVIM_OPS_TUNE_MEMORY'


def is_tuned() -> bool:
    """What the switch says.

    Raises:
        ValueError: It is neither 0 nor 1.
    """
    return is_on(SWITCH)


def keep_freed_memory() -> None:
    """Let glibc keep up to 62 MiB of freed memory for the next tensors.

    glibc gives freed memory back to the system beyond twice the largest block of at most 32 MiB
    that it has seen freed. Fresh memory is cleared page by page, which can cost as much as the
    arithmetic on it. The block that is freed here is never written to, so it costs nothing itself.
    With another malloc, or with settings of one's own, nothing happens.
    """
    torch.empty(31 << 20, dtype=torch.uint8)
