"""mmvim-ops is a distribution of its own, whose source distribution has all that a wheel takes."""

import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip('setuptools')
from distutils.core import run_setup  # setuptools' own, also where Python has none

from distributions import build_sdist, build_wheel

from mmvim_ops import version
from mmvim_ops.backends import compiled, schemas
from mmvim_ops.backends.cpp import library as cpp

OPS = Path(__file__).parents[2] / 'ops'


@pytest.fixture(scope='module')
def sdist(tmp_path_factory):
    return build_sdist(OPS, ('build', '*.egg-info', '*.so'), tmp_path_factory.mktemp('sdist'))


def test_the_op_installs_alone_and_needs_torch_only(monkeypatch):
    monkeypatch.chdir(OPS)
    distribution = run_setup('setup.py', stop_after='config')
    assert distribution.get_name() == 'mmvim-ops'
    folders = {path.parent.relative_to(OPS) for path in (OPS / 'mmvim_ops').rglob('*.py')}
    assert {name.replace('.', '/') for name in distribution.packages} == set(map(str, folders))
    assert distribution.install_requires == ['torch>=2.4']
    assert distribution.get_version() == version.__version__
    for extension in distribution.ext_modules:
        assert extension.name in ('mmvim_ops._cpp', 'mmvim_ops._onnxruntime', 'mmvim_ops._cuda')
        assert all(Path(source).exists() for source in extension.sources)


def test_the_source_distribution_has_what_is_compiled_and_what_compiles_it(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition('/')[2] for name in archive.getnames()}
    sources = [path for path in (OPS / 'csrc').rglob('*') if path.is_file()]
    for path in (*OPS.glob('build_*.py'), *sources, OPS / 'mmvim_ops/py.typed', OPS / 'LICENSE'):
        assert str(path.relative_to(OPS)) in names


@pytest.mark.slow
def test_the_source_distribution_builds_a_wheel_for_any_python(sdist, tmp_path, monkeypatch):
    monkeypatch.setenv('MMVIM_OPS_CUDA', '0')
    wheel = build_wheel(sdist, tmp_path)
    assert '-py3-none-' in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    expected = {'_cpp.so', '_onnxruntime.so', 'py.typed', 'onnxruntime.py'}
    assert {f'mmvim_ops/{name}' for name in expected} <= set(names)
    assert not [name for name in names if name.startswith(('build', 'csrc'))]


def test_a_library_for_another_torch_is_refused_before_it_is_loaded(tmp_path):
    library = tmp_path / '_cpp.so'
    library.write_bytes(compiled.MARK + schemas.library_interface('1.13.1').encode() + b'\0')
    reason = cpp._load(library)
    assert 'torch 1.13) than this one (' in reason
    assert schemas.library_interface('2.13.0+cpu') == schemas.library_interface('2.13.1')
