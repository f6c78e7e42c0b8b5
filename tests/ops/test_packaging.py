"""The op is a distribution of its own, too."""

from pathlib import Path

import pytest

pytest.importorskip('setuptools')
from distutils.core import run_setup  # setuptools' own, also where Python has none

OPS = Path(__file__).parents[2] / 'ops'


def test_the_op_installs_alone_and_needs_torch_only(monkeypatch):
    monkeypatch.chdir(OPS)
    distribution = run_setup('setup.py', stop_after='init')
    assert distribution.get_name() == 'mmvim-ops'
    folders = {path.parent.relative_to(OPS) for path in (OPS / 'mmvim_ops').rglob('*.py')}
    assert {name.replace('.', '/') for name in distribution.packages} == set(map(str, folders))
    assert distribution.install_requires == ['torch>=2.4']
    for extension in distribution.ext_modules:
        assert extension.name in ('mmvim_ops._cpp', 'mmvim_ops._cuda')
        assert all(Path(source).exists() for source in extension.sources)


def test_both_distributions_have_the_same_version(monkeypatch):
    versions = []
    for folder in (OPS, OPS.parent):
        monkeypatch.chdir(folder)
        versions.append(run_setup('setup.py', stop_after='init').get_version())
    assert versions[0] == versions[1]
