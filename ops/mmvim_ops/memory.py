"""How the process gets its memory on the CPU."""

import torch


def keep_freed_memory() -> None:
    """Let glibc keep up to 62 MiB of freed memory for the next tensors.

    It gives free memory back to the system beyond twice the largest block of at most 32 MiB that it
    has seen freed, and fresh memory is cleared page by page, which can cost as much as the
    arithmetic on it. The block that is freed here is never written to, so it costs nothing itself.
    With another malloc, or with settings of one's own, nothing happens.
    """
    torch.empty(31 << 20, dtype=torch.uint8)
