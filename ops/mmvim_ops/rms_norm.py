"""Root mean square norm that keeps little for its backward pass."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """``x / sqrt(mean(x²) + eps) * weight`` over the last dimension, as ``F.rms_norm``.

    Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467. On the CPU torch
    puts ``F.rms_norm`` together from several operations, each of which keeps a tensor of the size
    of ``x``. This one keeps ``x`` itself and one number per row.

    Args:
        x (Tensor): (..., channels).
        weight (Tensor): (channels,), dtype of ``x``.
        eps (float): Added to the mean square.

    Returns:
        Tensor: Shape and dtype of ``x``; differentiable once.
    """
    plain = torch.compiler.is_compiling() or torch.jit.is_tracing() or not torch.is_grad_enabled()
    if plain or x.device.type != 'cpu':
        return F.rms_norm(x, weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        scale = (rms.square() + eps).rsqrt()  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        grad_weight = (grad * normed).flatten(0, -2).sum(0)
        grad_x = grad * weight
        along = torch.linalg.vecdot(grad_x, normed).unsqueeze(-1) / x.shape[-1]  # (..., 1)
        grad_x.addcmul_(normed, along, value=-1).mul_(scale)
        return grad_x, grad_weight, None
