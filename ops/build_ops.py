"""What ``setup.py`` compiles: the CPU's kernels and, where CUDA is, the GPU's."""

import os
import sys
from pathlib import Path

import build_cpp
import build_cuda
from setuptools import Extension

CUDA = 'mmvim_ops._cuda'


class BuildOps(build_cpp.BuildOps):
    """For ``setup(cmdclass=...)``: an install goes on where a library does not compile."""

    def build_extension(self, ext):
        if ext.name != CUDA:
            return super().build_extension(ext)
        try:
            build_cuda.build(Path(self.get_ext_fullpath(ext.name)))
        except Exception as error:  # whatever it is, the package works without
            print(f'mmvim_ops: the CUDA kernels are left out: {error}', file=sys.stderr)


def extensions() -> list[Extension]:
    """For ``setup(ext_modules=...)``: the libraries that can be compiled here."""
    found = build_cpp.extensions()
    reason = build_cuda.why_not()
    if reason is not None:
        print(f'mmvim_ops: the CUDA kernels are left out: {reason}', file=sys.stderr)
        return found
    sources = [os.path.relpath(source) for source in sorted(build_cuda.SOURCES.glob('*.cu'))]
    return [*found, Extension(CUDA, sources, optional=True)]
