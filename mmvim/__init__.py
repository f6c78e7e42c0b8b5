"""Vision Mamba for OpenMMLab.

Importing this package registers its models and optimizer constructor with mmengine, so that a
config of mmsegmentation, mmdetection or mmpretrain finds them by name after
``custom_imports = dict(imports=['mmvim'])``.
"""

from mmvim_ops.version import __version__

from .engine import VimOptimWrapperConstructor
from .models import DeiT, SimpleFeaturePyramid, VisionMamba
from .utils import allow_mmengine_checkpoints
from .utils.openmmlab import find_configs_by_import_name, stand_in_for_mmcv_ops

__all__ = [
    'DeiT',
    'SimpleFeaturePyramid',
    'VimOptimWrapperConstructor',
    'VisionMamba',
    '__version__',
]

# torch refuses mmengine's own checkpoints otherwise; see mmvim/utils/inert.py.
allow_mmengine_checkpoints()
# OpenMMLab's packages and their forks, mmcv with and without its ops; see mmvim/utils/openmmlab.py.
find_configs_by_import_name()
stand_in_for_mmcv_ops()
