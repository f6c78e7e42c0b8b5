"""Builds distributions in copies of their folders, without network and without pip."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

BUILD = "from setuptools import build_meta as b; print(b.build_{}('{}'))"


def build_sdist(source: Path, leave_out: tuple[str, ...], folder: Path) -> Path:
    """The source distribution of a copy of ``source``, in ``folder``."""
    copy = folder / 'copy'
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns('.*[!m]', *leave_out))
    return folder / _run('sdist', folder, copy)


def build_wheel(sdist: Path, folder: Path) -> Path:
    """The wheel that an unpacked source distribution builds, in ``folder``."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / 'unpacked', filter='data')
    (source,) = (folder / 'unpacked').iterdir()
    return folder / _run('wheel', folder, source)


def _run(kind: str, folder: Path, source: Path) -> str:
    command = [sys.executable, '-c', BUILD.format(kind, folder)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]
