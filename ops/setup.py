"""The op alone, without the plugin around it (whose own setup.py brings it along):

pip install --no-build-isolation ./ops
"""

import sys
from pathlib import Path

from setuptools import find_packages, setup

sys.path.insert(0, str(Path(__file__).resolve().parent))
from build_ops import BuildOps, extensions

setup(
    name='mmvim-ops',
    version='0.1.0',
    description='Selective state space scan for PyTorch: CPU, CUDA and Triton',
    long_description=Path(__file__).with_name('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['mmvim_ops', 'mmvim_ops.*']),
    ext_modules=extensions(),
    cmdclass={'build_ext': BuildOps},
    python_requires='>=3.10',
    install_requires=['torch>=2.4'],
    extras_require={'triton': ['triton>=3.3; platform_system == "Linux"']},
)
