from . import alignment  # noqa: F401  (segmentors tell their parts from now on)
from .deit import DeiT
from .simple_feature_pyramid import SimpleFeaturePyramid
from .vision_mamba import VisionMamba
from .weighted_loss import ClassWeightedLoss

__all__ = ['ClassWeightedLoss', 'DeiT', 'SimpleFeaturePyramid', 'VisionMamba']
