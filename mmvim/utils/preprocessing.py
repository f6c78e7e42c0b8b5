"""What OpenMMLab's preprocessors do to pixels, without data samples."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ['normalise']

# Attributes by which the preprocessors of the three packages say that they swap BGR and RGB.
SWAPS = ('channel_conversion', '_channel_conversion', 'to_rgb')


def normalise(preprocessor: Any, images: Tensor) -> Tensor:
    """RGB images (..., 3, H, W), float32 from 0 to 255, as the model's preprocessor makes them."""
    if not any(getattr(preprocessor, name, False) for name in SWAPS):
        images = images.flip(-3)  # it leaves BGR, as OpenMMLab's loaders give it
    if getattr(preprocessor, '_enable_normalize', False):
        return (images - preprocessor.mean) / preprocessor.std
    return images
