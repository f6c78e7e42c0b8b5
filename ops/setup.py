"""What pyproject.toml cannot say of mmvim-ops: its compiled libraries, and the wheel's tag."""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

sys.path.insert(0, str(Path(__file__).resolve().parent))
from build_ops import BuildOps, extensions


class Wheel(bdist_wheel):
    """The libraries have no Python in them, so their wheel serves every Python of a platform."""

    def get_tag(self):
        return 'py3', 'none', super().get_tag()[2]


setup(ext_modules=extensions(), cmdclass={'build_ext': BuildOps, 'bdist_wheel': Wheel})
