"""The depthwise causal convolution by PyTorch's own operator."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from ...calls import Conv1dCall
from ...naive import compute_dtype


def conv1d(call: Conv1dCall) -> Tensor:
    x, weight, bias, silu, reverse = call
    if 0 in x.shape:  # F.conv1d refuses it
        return x + 0 * weight.sum().to(x.dtype)
    dtype, past = compute_dtype(x.dtype), weight.shape[1] - 1
    kernel = weight.to(dtype)[:, None]  # (D, 1, taps)
    if reverse:
        kernel = kernel.flip(-1)
    # There is no autocast of tensors without data.
    with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
        bias = None if bias is None else bias.to(dtype)
        padded = F.pad(x.to(dtype), (0, past) if reverse else (past, 0))
        out = F.conv1d(padded, kernel, bias, groups=x.shape[1])  # (B, D, L)
    out = (F.silu(out) if silu else out).to(x.dtype)
    if x.stride(1) < x.stride(2):
        out = out.transpose(1, 2).contiguous().transpose(1, 2)  # as x in memory
    return out
