"""Questions about sizes that compilers must not answer for one input only."""

from __future__ import annotations

import torch
from torch.fx.experimental import symbolic_shapes

__all__ = ['all_same', 'at_least']


# Dynamo of older torch (before 2.7) cannot trace questions of what is known.
TRACEABLE = hasattr(symbolic_shapes, 'guard_or_false')


def all_same(sizes: tuple[int, ...], others: tuple[int, ...]) -> bool:
    """Whether sizes are the same: in a compiler, whether they are for every input.

    A plain comparison of sizes that vary would compile for inputs that answer it alike, and refuse
    or recompile for others.
    """
    if TRACEABLE and torch.compiler.is_compiling():
        return all(
            symbolic_shapes.statically_known_true(size == other)
            for size, other in zip(sizes, others, strict=True)
        )
    return tuple(sizes) == tuple(others)


def at_least(size: int, least: int) -> int:
    """``max(size, least)`` that leaves a compiler's size a variable."""
    if not torch.compiler.is_compiling():
        return max(size, least)
    if TRACEABLE and symbolic_shapes.statically_known_true(size >= least):
        return size
    return torch.sym_max(size, least)
