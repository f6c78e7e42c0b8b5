"""Backend 'cpp': the kernels of ``csrc/cpu``, compiled when the package is installed.

The operators are defined and implemented in the shared library beside this file; here they get what
torch.compile and autograd need to know about them.
"""

from pathlib import Path

import torch
from torch import Tensor

from ...memory import keep_freed_memory
from ...naive import compute_dtype
from ..operators import (
    fake_bidirectional_scan_backward,
    fake_conv1d,
    fake_conv1d_backward,
    fake_scan_backward,
    needs_gradient,
    register_gradients,
)
from ..torch import conv1d as torch_conv

LIBRARY = Path(__file__).parents[2] / '_cpp.so'
BUILD_COMMAND = 'pip install --no-build-isolation --no-deps -e .'
CHUNK = 160  # kChunk of csrc/cpu/args.h: steps between two checkpoints
MOST_TAPS = 8  # kMostTaps of csrc/cpu/conv1d.h


def _load() -> str | None:
    """Load the library; returns what is wrong where that fails."""
    if not LIBRARY.exists():
        return f'it is not compiled; in the source tree, run: {BUILD_COMMAND}'
    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        cause = error.__cause__ or error
        return f'its library does not load ({cause}); compile it again: {BUILD_COMMAND}'
    keep_freed_memory()
    return None


MISSING = _load()


# What the registry calls; see mmvim_ops.backends.Backend.


def scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse):
    save = needs_gradient(u, delta, A, B, C, D, z, delta_bias)
    out, last_state, _ = torch.ops.mmvim_ops.cpp_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, save
    )
    return out, last_state


def bidirectional_scan(forward, backward, z, delta_softplus, scale):
    save = needs_gradient(*forward, *backward, z)
    return torch.ops.mmvim_ops.cpp_bidirectional_scan(
        *forward, *backward, z, delta_softplus, scale, save
    )[0]


def scan_block(out, state, direction, z, delta_softplus, reverse, accumulate, scale):
    u, delta, A, B, C, D, delta_bias = direction
    wide = out.to(state.dtype)  # half precision is computed in float32
    torch.ops.mmvim_ops.cpp_scan_block(
        *(u, delta, A, B, C, D, z, delta_bias, state, wide),
        *(delta_softplus, reverse, accumulate, scale),
    )
    if wide is not out:
        out.copy_(wide)


def conv1d(x, weight, bias, silu, reverse):
    if weight.shape[1] > MOST_TAPS:
        return torch_conv.conv1d(x, weight, bias, silu, reverse)
    return torch.ops.mmvim_ops.cpp_conv1d(x, weight, bias, silu, reverse)


# Outputs for tracing: shapes, dtypes and strides without data.


def _checkpoints(u: Tensor, A: Tensor, save: bool) -> Tensor:
    batch, channels, length = u.shape
    saved = torch.sym_max(length - 1, 0) // CHUNK
    return u.new_empty(
        (batch, saved, A.shape[1], channels) if save else (0,), dtype=compute_dtype(u.dtype)
    )


def _fake_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, save):
    last_state = u.new_empty(u.shape[0], u.shape[1], A.shape[1], dtype=compute_dtype(u.dtype))
    return torch.empty_like(u), last_state, _checkpoints(u, A, save)


def _fake_bidirectional_scan(*arguments):
    u, A, A_b, save = arguments[0], arguments[2], arguments[9], arguments[-1]
    return torch.empty_like(u), _checkpoints(u, A, save), _checkpoints(u, A_b, save)


def _fake_scan_block(*arguments):
    return None


if MISSING is None:
    torch.library.register_fake('mmvim_ops::cpp_scan_block', _fake_scan_block)
    for name, fake, fake_backward in (
        ('cpp_scan', _fake_scan, fake_scan_backward),
        ('cpp_bidirectional_scan', _fake_bidirectional_scan, fake_bidirectional_scan_backward),
        ('cpp_conv1d', fake_conv1d, fake_conv1d_backward),
    ):
        torch.library.register_fake(f'mmvim_ops::{name}', fake)
        torch.library.register_fake(f'mmvim_ops::{name}_backward', fake_backward)
    register_gradients('cpp')
