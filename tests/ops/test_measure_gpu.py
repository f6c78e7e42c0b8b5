"""ops/measure_gpu.sh with stand-ins for Python and compute-sanitizer, which write down how they are
called."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / 'ops/measure_gpu.sh'
FAKE_PROGRAM = r"""#!/usr/bin/env bash
echo "self-check=$MMVIM_OPS_SELF_CHECK $*" >>"$CALLS"
[[ -z $SLOW || $* != *$SLOW* ]] || exec sleep 30
[[ -z $FAILING || $* != *$FAILING* ]] || { echo 'something is wrong' && exit 3; }
"""
pytestmark = pytest.mark.skipif(
    not (shutil.which('timeout') and shutil.which('nproc')), reason='needs coreutils (Linux)'
)


class Checkout:
    def __init__(self, folder: Path):
        self.folder, self.calls, self.out = folder, folder / 'calls', folder / 'out'
        (folder / 'ops/mmvim_ops').mkdir(parents=True)
        shutil.copy(SCRIPT, folder / 'ops')
        self.python = self.fake('fake_python')
        self.fake('compute-sanitizer')
        self.calls.touch()

    def fake(self, name: str) -> Path:
        path = self.folder / name
        path.write_text(FAKE_PROGRAM)
        path.chmod(0o755)
        return path

    def measure(self, *arguments, failing='', slow='', **more) -> subprocess.CompletedProcess:
        paths = dict(PYTHON=str(self.python), CALLS=str(self.calls), OUT_DIR=str(self.out))
        paths['PATH'] = f'{self.folder}{os.pathsep}{os.environ["PATH"]}'
        command = ['bash', str(self.folder / 'ops/measure_gpu.sh'), *map(str, arguments)]
        env = {**os.environ, **paths, 'FAILING': failing, 'SLOW': slow, **more}
        return subprocess.run(command, env=env, capture_output=True, text=True)

    def verdicts(self) -> dict[str, str]:
        lines = (self.out / 'verdicts.txt').read_text().splitlines()
        return dict(line.removeprefix('== ').split(': ', 1) for line in lines)


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    return Checkout(tmp_path)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['scan', 'nonsense'], "unknown stage 'nonsense'; stages: build check scan"),
        (['=5'], "unknown stage ''"),
        ([], 'no stage given; stages: build'),
        (['scan=soon'], "seconds must be a number, got 'scan=soon'"),
        (['scan=0'], 'seconds must be a number'),
        (['build', '--library', 'missing.so'], 'there is no file missing.so'),
        (['build', '--out'], '--out needs a value'),
    ],
)
def test_what_is_wrong_is_refused_before_anything_runs(arguments, message, checkout):
    result = checkout.measure(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert not checkout.calls.read_text()


def test_all_stages_run_in_order_after_failures(checkout):
    result = checkout.measure('all', failing='benchmark_gpu.py')
    verdicts = checkout.verdicts()
    order = ['build', 'check', 'scan', 'mixer', 'models', 'train', 'sanitize', 'sweep', 'triton']
    assert list(verdicts) == order
    assert result.returncode == 1
    assert verdicts['check'].startswith('ok, ')
    assert verdicts['scan'].startswith('failed: scan ended with 3, ')
    assert 'something is wrong' in result.stdout
    assert verdicts['models'].startswith('ok')
    calls = checkout.calls.read_text()
    assert calls.index('-m not triton tests/ops/gpu') < calls.index('-m triton tests/ops/gpu')
    assert f'--json {checkout.out}/scan.json --backends cuda' in calls


def test_no_backend_checks_itself_of_its_own_accord(checkout):
    """What is wrong then shows in tests and figures, where it would be refused before."""
    checkout.measure('all', MMVIM_OPS_SELF_CHECK='1')
    calls = re.findall('^self-check=(.)', checkout.calls.read_text(), re.MULTILINE)
    assert len(calls) > 10
    assert set(calls) == {'0'}


def test_what_needs_all_memory_has_a_process_of_its_own(checkout):
    checkout.measure('check')
    calls = checkout.calls.read_text().splitlines()
    (large,) = (call for call in calls if call.endswith('test_gpu_large.py'))
    (others,) = (call for call in calls if call.endswith('tests/ops/gpu'))
    assert ' -n ' in others
    assert ' -n ' not in large


def test_no_sanitizer_takes_the_time_of_the_others(checkout):
    checkout.measure('sanitize=8', slow='--tool memcheck')
    assert 'failed: memcheck stopped after 3 s, ' in checkout.verdicts()['sanitize']
    tools = re.findall(r'--tool (\w+)', checkout.calls.read_text())
    assert tools == ['memcheck', 'racecheck', 'initcheck']


def test_a_stage_ends_when_its_time_is_over(checkout):
    result = checkout.measure('models=3', 'sweep', slow='models/bf16 ')
    assert result.returncode == 1
    verdict = checkout.verdicts()['models']
    assert re.search('bf16 stopped after [23] s', verdict)
    assert 'fp32-graph not started' in verdict
    assert checkout.verdicts()['sweep'].startswith('ok')


def test_a_library_from_elsewhere_is_not_compiled_again(checkout):
    library = checkout.folder / 'my.so'
    library.write_text('kernels')
    assert checkout.measure('--library', library, 'build').returncode == 0
    assert (checkout.folder / 'ops/mmvim_ops/_cuda.so').read_text() == 'kernels'
    assert 'build_cuda' not in checkout.calls.read_text()


def test_mamba_ssm_is_compiled_beside_the_tests_and_waited_for(checkout):
    result = checkout.measure('check', 'scan', MAMBA_SSM='their.tar.gz')
    assert result.returncode == 0, result.stdout
    calls = checkout.calls.read_text()
    assert calls.index('build_mamba_ssm.py their.tar.gz') < calls.index('benchmark_gpu.py')
