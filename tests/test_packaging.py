"""The distribution of mmvim: what it needs, and that it brings configs and tools along."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

pytest.importorskip('setuptools')
from distutils.core import run_setup  # setuptools' own, also where Python has none

from distributions import build_sdist, build_wheel

import mmvim
from mmvim.utils.launch import read_config

ROOT = Path(__file__).parents[1]


def requirements(monkeypatch, **settings):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    distribution = run_setup('setup.py', stop_after='config')
    assert distribution.get_version() == mmvim.__version__
    return distribution.install_requires, distribution.extras_require


def test_needs_the_op_in_the_same_version(monkeypatch):
    needs, _ = requirements(monkeypatch)
    assert f'mmvim-ops=={mmvim.__version__}' in needs


@pytest.mark.parametrize(('stack', 'forks'), [('openmmlab', False), ('onedl', True)])
def test_needs_the_packages_of_one_stack_only(stack, forks, monkeypatch):
    needs, extras = requirements(monkeypatch, MMVIM_STACK=stack)
    everything = [*needs, *(name for extra in extras.values() for name in extra)]
    packages = [name for name in everything if name.removeprefix('onedl-').startswith('mm')]
    packages = [name for name in packages if not name.startswith('mmvim')]
    assert len(packages) >= 5
    assert {name.startswith('onedl-') for name in packages} == {forks}


def test_an_unknown_stack_is_refused(monkeypatch):
    with pytest.raises(ValueError, match='must be one of openmmlab, onedl, got mine'):
        requirements(monkeypatch, MMVIM_STACK='mine')


def test_the_source_distribution_builds_a_wheel_with_all_that_runs(tmp_path):
    leave_out = ('tests', 'docs', 'data', 'work_dirs', 'build', 'csrc', '*.egg-info', '*.so')
    wheel = build_wheel(build_sdist(ROOT, leave_out, tmp_path), tmp_path)
    assert wheel.name.endswith('-py3-none-any.whl')
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ('configs', 'tools'):
        for path in (ROOT / folder).rglob('*'):
            if path.suffix in ('.py', '.sh', '.yml'):
                assert f'mmvim/.mim/{path.relative_to(ROOT)}' in names
    for path in (ROOT / 'mmvim').rglob('*.py'):
        assert str(path.relative_to(ROOT)) in names
    assert {'mmvim/.mim/model-index.yml', 'mmvim/py.typed', 'mmvim/__main__.py'} <= names
    assert not [name for name in names if name.startswith('mmvim_ops')]


def test_extras_have_what_the_tools_ask_for(monkeypatch):
    _, extras = requirements(monkeypatch)
    assert {'onnx', 'onnxscript', 'onnxruntime'} <= set(extras['onnx'])
    assert 'rasterio' in extras['geo']


def test_metafiles_name_every_config():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    files = [yaml.safe_load((ROOT / path).read_text()) for path in index['Import']]
    models = [model for file in files for model in file['Models']]
    collections = {entry['Name'] for file in files for entry in file['Collections']}
    configs = {path.relative_to(ROOT) for path in ROOT.glob('configs/[!_]*/*.py')}
    assert {Path(model['Config']) for model in models} == configs
    assert [model['Name'] for model in models] == [Path(model['Config']).stem for model in models]
    assert {model['In Collection'] for model in models} == collections


def test_the_tools_run_from_anywhere(tmp_path):
    def run(*arguments):
        command = [sys.executable, '-m', 'mmvim', *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    for tool in ('train', 'predict', 'export'):
        assert run(tool, '--help').stdout.startswith(f'usage: {tool}.py')
    assert 'TOOL is one of' in run('no-such-tool').stderr
    assert 'TOOL is one of' in run().stderr


def test_configs_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = 'configs/vim/vim-demo_upernet_shapes-128x128.py'
    assert read_config(name).model.backbone.type == 'VisionMamba'
    (tmp_path / 'configs/vim').mkdir(parents=True)
    (tmp_path / name).write_text('model = dict(name="mine")')
    assert read_config(name).model == dict(name='mine')
