"""Vision Mamba for OpenMMLab.

Importing this package registers its models and optimizer constructor with mmengine, so that a
config of mmsegmentation, mmdetection or mmpretrain finds them by name after
``custom_imports = dict(imports=['mmvim'])``.
"""

from .engine import VimOptimWrapperConstructor
from .models import DeiT, SimpleFeaturePyramid, VisionMamba
from .utils import allow_mmengine_checkpoints

__all__ = ['DeiT', 'SimpleFeaturePyramid', 'VimOptimWrapperConstructor', 'VisionMamba']
__version__ = '0.1.0'

# torch refuses mmengine's own checkpoints otherwise; see mmvim/utils/inert.py.
allow_mmengine_checkpoints()
