"""What a backbone sees: effective receptive fields and feature maps."""

from __future__ import annotations

import numpy as np
import torch
from mmengine.model import ImgDataPreprocessor
from torch import Tensor, nn

from mmvim.utils import preprocessing

__all__ = ['normalise', 'principal_colours', 'receptive_field', 'share_of_area']


def normalise(image: np.ndarray, preprocessor: ImgDataPreprocessor) -> Tensor:
    """(H, W, 3) RGB of uint8 to the network's (1, 3, H, W), as its preprocessor makes them."""
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
    return preprocessing.normalise(preprocessor, pixels.to(preprocessor.device))


def receptive_field(backbone: nn.Module, image: Tensor, directions: int = 8) -> np.ndarray:
    """How much each pixel says about the centre of the last feature map.

    The absolute value of the centre's gradient (Luo et al., "Understanding the effective receptive
    field in deep convolutional neural networks", NeurIPS 2016), of random sums of its channels:
    their plain sum is constant after a layer norm, and has no gradient.

    Args:
        backbone (nn.Module): Returns maps (1, C, Hp, Wp), the last of which counts.
        image (Tensor): (1, 3, H, W).
        directions (int): Random sums, the same in every call, whose gradients are averaged.

    Returns:
        np.ndarray: (H, W), whose sum is 1.

    Raises:
        ValueError: The backbone returns no maps.
    """
    image = image.clone().requires_grad_()
    feature = backbone(image)[-1]
    if feature.ndim != 4:
        raise ValueError(
            "a receptive field needs maps: expected out_type='featmap', got an output of shape "
            f'{tuple(feature.shape)}'
        )
    centre = feature[0, :, feature.shape[2] // 2, feature.shape[3] // 2]
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(directions, len(centre), generator=generator).to(centre)
    field = np.zeros(image.shape[2:])
    for value in weights @ centre:
        (gradient,) = torch.autograd.grad(value, image, retain_graph=True)
        field += gradient[0].abs().sum(0).double().cpu().numpy()  # (H, W)
    return field / max(field.sum(), np.finfo(float).tiny)


def share_of_area(field: np.ndarray, part: float) -> float:
    """The least share of an image's pixels that has ``part`` of a receptive field (H, W)."""
    largest_first = np.sort(field, axis=None)[::-1].cumsum() / field.sum()
    return (np.searchsorted(largest_first, part) + 1) / field.size


def principal_colours(feature: Tensor) -> np.ndarray:
    """The three principal components of a map (1, C, H, W) as colours, (H, W, 3) of uint8."""
    height, width = feature.shape[2:]
    vectors = feature[0].flatten(1).T.float()  # (H * W, C)
    vectors = vectors - vectors.mean(0)
    axes = torch.linalg.svd(vectors, full_matrices=False).Vh[:3]  # (3, C)
    # A component's sign says nothing: the largest entry of an axis is made positive.
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    values = vectors @ (axes * largest.sign()).T  # (H * W, 3)
    low, high = values.quantile(values.new_tensor([0.02, 0.98]), dim=0)
    colours = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return (255 * colours).round().byte().reshape(height, width, 3).cpu().numpy()
