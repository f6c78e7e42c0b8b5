"""The installer's behaviour, with a stand-in for Python: nothing is installed, no network is used.

The stand-in writes down how it is called and pretends that what pip is asked for gets installed.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAKE_PYTHON = r"""#!/usr/bin/env bash
echo "$*" >>"$CALLS"
asked() { grep -q -e "pip install.*$1" "$CALLS"; }
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && touch "$3/pyvenv.cfg" && cp "$0" "$3/bin/python" ;;
  *"-m pip install"*"$FAILING"*) echo 'ERROR: no such distribution'; exit 1 ;;
  *version_info*) echo "$VERSION" ;;
  *'"include"'*) touch "${0%/*}/Python.h" && echo "${0%/*}" ;;
  *'"purelib"'*) echo "${0%/*}" ;;
  *urllib*) exit "$OFFLINE" ;;
  *cpp_extension*) echo 0 ;;
  *parents*) echo "$OWN_TORCH"; [[ -n $OWN_TORCH ]] ;;
  -) grep -q mmcv.ops && asked "$MMCV_IS_GOOD_AFTER" ;;
esac
"""
pytestmark = pytest.mark.skipif(
    not (shutil.which('make') and shutil.which('flock')), reason='needs make and flock (Linux)'
)


class Checkout:
    """A copy of what the installer reads, and the stand-in for Python."""

    def __init__(self, folder: Path):
        self.folder, self.env, self.calls = folder, folder / '.venv', folder / 'calls'
        self.stamp = self.env / '.mmvim-installed'
        files = ('Makefile', 'constraints.txt', 'setup.py', 'pyproject.toml', 'tools/install.sh')
        for name in files:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        self.script('python', FAKE_PYTHON)
        self.script('g++', '#!/bin/sh')
        self.script('nvidia-smi', '#!/bin/sh\nexit 1')

    def script(self, name, text):
        path = self.folder / 'bin' / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def make(self, target='install', **env):
        """Runs make; then `called` is what the stand-in was called with, `pip` what pip was."""
        before = len(self.calls.read_text()) if self.calls.exists() else 0
        settings = {
            'PATH': f'{self.folder}/bin:{os.environ["PATH"]}',
            'CALLS': str(self.calls),
            'PYTHON': str(self.folder / 'bin/python'),
            'VERSION': '3.11',
            'FAILING': 'nothing',
            'OFFLINE': '0',
            'OWN_TORCH': '',
            'MMCV_IS_GOOD_AFTER': 'isolation [a-z-]*mmcv',
        }
        done = subprocess.run(
            ['make', '-s', target],
            cwd=self.folder,
            env={**settings, **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        self.called = self.calls.read_text()[before:].splitlines() if self.calls.exists() else []
        self.pip = [
            line.split('install ', 1)[1] for line in self.called if '-m pip install' in line
        ]
        return done

    def asked(self, package):
        return [line for line in self.pip if package in line]


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def test_first_install_does_every_step_and_the_second_nothing(checkout):
    done = checkout.make()
    assert done.returncode == 0, done.stderr
    assert '[5/5]' in done.stdout
    for package in ('torch==', ' mmcv', '-e ./ops -e .[test]'):
        assert len(checkout.asked(package)) == 1, package
    assert '--no-build-isolation' in checkout.asked(' mmcv')[0]

    assert checkout.make().returncode == 0
    assert checkout.called == ['-VV']


def test_the_demo_compiles_nothing_of_mmcv_and_a_full_install_builds_on_it(checkout):
    assert checkout.make('demo').returncode == 0
    assert checkout.asked('mmcv-lite') and checkout.asked('-e .[seg]')
    assert not checkout.asked('--no-build-isolation mmcv') + checkout.asked('triton')
    assert checkout.called[-1].startswith('tools/demo.py')
    assert checkout.make('demo').returncode == 0
    assert not checkout.pip

    assert checkout.make().returncode == 0
    assert checkout.asked('--no-build-isolation mmcv') and checkout.asked('-e .[test]')
    assert any('uninstall -y mmcv-lite' in line for line in checkout.called)
    assert checkout.make('demo').returncode == 0
    assert not checkout.pip


def test_the_forks_of_the_openmmlab_packages_can_be_chosen(checkout):
    done = checkout.make(MMVIM_STACK='onedl', VERSION='3.13')
    assert done.returncode == 0, done.stderr
    assert checkout.asked(' onedl-mmcv') and not checkout.asked(' mmcv')
    assert checkout.make('demo', MMVIM_STACK='').returncode == 0  # the environment remembers
    done = checkout.make(MMVIM_STACK='openmmlab')
    assert 'was made for MMVIM_STACK=onedl, not openmmlab' in done.stderr


def test_the_demo_of_the_forks_takes_mmcv_without_ops_and_leaves_it_out_of_pips_cache(checkout):
    assert checkout.make('demo', MMVIM_STACK='onedl').returncode == 0
    (line,) = checkout.asked('onedl-mmcv')
    assert '--no-cache-dir' in line and '--no-build-isolation' not in line


def test_editing_setup_py_installs_the_project_again_and_does_not_compile_mmcv(checkout):
    checkout.make()
    (checkout.folder / 'setup.py').write_text('# edited')
    assert checkout.make().returncode == 0
    assert checkout.asked('-e .')
    assert not checkout.asked(' mmcv')


def test_failing_step_says_which_and_why_leaves_no_stamp_and_is_taken_up_again(checkout):
    done = checkout.make(FAILING='[test]')
    assert done.returncode != 0
    assert 'stopped at step 4/5 (this project' in done.stderr
    assert 'ERROR: no such distribution' in done.stderr
    assert not checkout.stamp.exists()

    assert checkout.make().returncode == 0
    assert checkout.stamp.exists()
    assert not checkout.asked(' mmcv')
    assert [('--ignore-installed' in line) for line in checkout.asked('[test]')] == [True]


def test_failing_again_after_success_takes_the_stamp_away(checkout):
    checkout.make()
    text = (checkout.folder / 'setup.py').read_text()
    (checkout.folder / 'setup.py').write_text('# edited')
    assert checkout.make(FAILING='-e .').returncode != 0
    (checkout.folder / 'setup.py').write_text(text)
    assert checkout.make().returncode == 0
    assert checkout.asked('-e .')


@pytest.mark.parametrize(
    ('settings', 'reason'),
    [
        ({'VERSION': '3.8'}, 'is Python 3.8; the packages of openmmlab need 3.10 to 3.12'),
        ({'VERSION': '3.13'}, 'or for Python 3.13 MMVIM_STACK=onedl'),
        ({'MMVIM_STACK': 'mine'}, 'MMVIM_STACK=mine is unknown'),
        ({'PYTHON': '/no/such/python'}, "no Python at '/no/such/python'"),
        ({'MMVIM_TORCH': 'tpu'}, 'MMVIM_TORCH=tpu is unknown'),
        ({'VENV': 'tools'}, 'tools is there and is not a Python environment'),
    ],
)
def test_unsuitable_machine_or_setting_stops_before_anything_is_made(checkout, settings, reason):
    done = checkout.make(**settings)
    assert done.returncode != 0
    assert reason in done.stderr
    assert not checkout.env.exists()


def test_stale_mmcv_from_pips_cache_is_built_afresh_once(checkout):
    done = checkout.make(MMCV_IS_GOOD_AFTER='--no-cache-dir')
    assert done.returncode == 0, done.stderr
    assert ['--no-cache-dir' in line for line in checkout.asked(' mmcv')] == [False, True]

    (checkout.env / '.mmvim-installed').unlink()
    done = checkout.make(MMCV_IS_GOOD_AFTER='never')
    assert done.returncode != 0
    assert 'its ops do not work' in done.stderr
    assert not checkout.stamp.exists()


@pytest.mark.parametrize('offline', ['0', '1'])
def test_cpu_torch_comes_from_its_own_index_where_that_answers(checkout, offline):
    assert checkout.make(OFFLINE=offline).returncode == 0
    assert ['download.pytorch.org' in line for line in checkout.asked('torch==')] == [
        offline == '0'
    ]
    assert not any('download.pytorch.org' in line for line in checkout.pip if 'torch==' not in line)


def test_where_there_is_a_gpu_the_users_own_cuda_torch_is_used(checkout):
    checkout.script('nvidia-smi', '#!/bin/sh\necho GPU 0: one')
    done = checkout.make(OWN_TORCH='/opt/their/site-packages')
    assert done.returncode == 0, done.stderr
    assert (checkout.env / 'bin/own-torch.pth').read_text() == '/opt/their/site-packages\n'
    assert not checkout.asked('torch==')
    assert all('-c constraints.txt' not in line for line in checkout.pip)
    pins = (checkout.env / 'constraints.txt').read_text().splitlines()
    assert 'mmcv==2.1.0' in pins and not [pin for pin in pins if pin.startswith('torch')]


def test_where_there_is_a_gpu_and_no_own_torch_pip_gets_the_cuda_build(checkout):
    checkout.script('nvidia-smi', '#!/bin/sh\necho GPU 0: one')
    assert checkout.make().returncode == 0
    assert len(checkout.asked('torch==')) == 1
    assert 'download.pytorch.org' not in checkout.asked('torch==')[0]
    done = checkout.make(MMVIM_TORCH='cpu')
    assert 'was made for MMVIM_TORCH=cuda, not cpu' in done.stderr


@pytest.mark.parametrize('own_torch', ['', '/opt/their/site-packages'])
def test_classification_has_an_environment_of_its_own(checkout, own_torch):
    done = checkout.make('test-cls', OWN_TORCH=own_torch)
    assert done.returncode == 0, done.stderr
    assert not checkout.env.exists()
    assert (checkout.folder / '.venv-cls/.mmvim-installed').exists()
    torch = checkout.asked('torch===')
    assert len(torch) == (0 if own_torch else 1)
    assert all('torchvision==' in line and 'pytorch.org' not in line for line in torch)
    assert checkout.asked('-e .[cls] pytest') and checkout.asked('mmcv-lite')
    assert not checkout.asked('--no-build-isolation mmcv')
    assert checkout.called[-1].startswith('-m pytest tests/cls')

    done = checkout.make('install', VENV='.venv-cls')
    assert 'was made for MMVIM_TASKS=cls, not dense' in done.stderr
    done = checkout.make('install', MMVIM_TASKS='cls', MMVIM_TORCH='cpu')
    assert 'torchvision, which has no build for a CPU torch' in done.stderr
    assert not checkout.env.exists()


@pytest.mark.parametrize(('target', 'fast'), [('test', True), ('test-all', False)])
def test_the_slow_tests_are_left_out_of_make_test_only(checkout, target, fast):
    assert checkout.make(target).returncode == 0
    assert '-m pytest -n auto' in checkout.called[-1]
    assert ('not slow' in checkout.called[-1]) is fast


def test_help_is_the_default_and_names_the_targets(checkout):
    done = checkout.make('help')
    for target in ('install', 'demo', 'test', 'lint', 'clean-env'):
        assert f'  {target} ' in done.stdout
    assert not checkout.env.exists()


def test_clean_env_removes_an_environment_and_nothing_else(checkout):
    checkout.make()
    assert 'removing .venv' in checkout.make('clean-env').stdout
    assert not checkout.env.exists()
    assert 'nothing removed' in checkout.make('clean-env', VENV='tools').stdout
    assert (checkout.folder / 'tools/install.sh').exists()
