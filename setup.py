"""What pyproject.toml cannot say of mmvim: its version, and which OpenMMLab packages it needs.

There are two sets of these with the same import names: OpenMMLab's own and its maintained forks,
whose distributions are called onedl-*. pip knows distributions only and would install one set over
the other. So the requirements name the set that is in the environment; ``MMVIM_STACK`` (openmmlab,
the default, or onedl) chooses where there is none.
"""

import os
import runpy
import subprocess
import sys

from setuptools import setup

STACKS = {
    'openmmlab': {
        'mmengine': ['mmengine>=0.10.5'],
        'mmcv': ['mmcv>=2.1.0,<2.2.0'],
        'mmcv-lite': ['mmcv-lite>=2.1.0,<2.2.0'],  # mmcv without compiled ops
        'mmseg': ['mmsegmentation>=1.2.0', 'ftfy', 'regex'],
        'mmdet': ['mmdet>=3.3.0'],
        'mmpretrain': ['mmpretrain>=1.2.0'],
    },
    'onedl': {
        'mmengine': ['onedl-mmengine>=0.10.12'],
        'mmcv': ['onedl-mmcv>=2.3.6'],
        'mmcv-lite': ['onedl-mmcv>=2.3.6'],
        'mmseg': ['onedl-mmsegmentation>=1.4.2'],
        'mmdet': ['onedl-mmdetection>=3.5.1'],
        'mmpretrain': ['onedl-mmpretrain>=1.3.6'],
    },
}


def installed() -> set[str]:
    """Names of the distributions in the environment that this is installed into.

    -E, as pip's isolated builds hide them behind PYTHONPATH.
    """
    names = 'import importlib.metadata as m; print(*(d.name for d in m.distributions()))'
    command = [sys.executable, '-E', '-c', names]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


here = installed()
stack = os.environ.get('MMVIM_STACK') or ('onedl' if 'onedl-mmengine' in here else 'openmmlab')
if stack not in STACKS:
    raise ValueError(f'MMVIM_STACK must be one of {", ".join(STACKS)}, got {stack}')
needs = STACKS[stack]
version = runpy.run_path('ops/mmvim_ops/version.py')['__version__']
test = [
    'pytest',
    'pytest-xdist',
    'ruff',
    'hypothesis',
    'triton>=3.3; platform_system == "Linux"',
]
hub = ['huggingface_hub', 'safetensors']
geo = ['rasterio']

setup(
    version=version,
    install_requires=[
        f'mmvim-ops=={version}',
        'torch>=2.4',
        'numpy',
        *needs['mmengine'],
        *needs['mmcv' if 'mmcv' in here else 'mmcv-lite'],
    ],
    extras_require={
        'seg': needs['mmseg'],
        'det': needs['mmdet'],
        'cls': needs['mmpretrain'],
        'hub': hub,
        'geo': geo,
        'onnx': ['onnx', 'onnxscript', 'onnxruntime'],
        'test': [*needs['mmseg'], *needs['mmdet'], *hub, *geo, *test],
    },
)
