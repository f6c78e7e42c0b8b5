"""Package metadata. The usual way in is ``make install``; see README.md."""

import sys
from pathlib import Path

from setuptools import find_packages, setup

sys.path.insert(0, str(Path(__file__).resolve().parent / 'ops'))
from build_ops import BuildOps, extensions

MMSEG = ['mmsegmentation>=1.2.0', 'ftfy', 'regex']
MMDET = ['mmdet>=3.3.0']
MMPRETRAIN = ['mmpretrain>=1.2.0']

setup(
    name='mmvim',
    version='0.1.0',
    description='Vision Mamba for dense prediction in OpenMMLab',
    long_description=Path(__file__).with_name('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['mmvim', 'mmvim.*'])
    + find_packages('ops', include=['mmvim_ops', 'mmvim_ops.*']),
    package_dir={'mmvim_ops': 'ops/mmvim_ops'},
    ext_modules=extensions(),
    cmdclass={'build_ext': BuildOps},
    python_requires='>=3.10',
    install_requires=['torch>=2.4', 'numpy', 'mmengine>=0.10.5', 'mmcv>=2.1.0,<2.2.0'],
    extras_require={
        'seg': MMSEG,
        'det': MMDET,
        'cls': MMPRETRAIN,
        'test': MMSEG + MMDET + ['pytest', 'ruff', 'triton>=3.3; platform_system == "Linux"'],
    },
)
