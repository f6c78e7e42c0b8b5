"""tools/collect_wheels.sh asks pip for the versions that are tested; a stand-in writes it down."""

import os
import subprocess

import pytest
from command_line import ROOT

SCRIPT = ROOT / 'tools/collect_wheels.sh'


def collect(tmp_path, *arguments) -> tuple[subprocess.CompletedProcess, str]:
    python, calls = tmp_path / 'fake_python', tmp_path / 'calls'
    python.write_text(f'#!/usr/bin/env bash\necho "$*" >>{calls}\nmkdir -p {tmp_path}/wheels\n')
    python.chmod(0o755)
    command = ['bash', str(SCRIPT), *arguments]
    env = {**os.environ, 'PYTHON': str(python)}
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    return result, calls.read_text() if calls.exists() else ''


def test_versions_are_those_of_the_constraints(tmp_path):
    result, calls = collect(tmp_path, str(tmp_path / 'wheels'), '3.12', 'mmdet')
    assert result.returncode == 0, result.stderr
    pins = dict(
        line.split('==') for line in (ROOT / 'constraints.txt').read_text().split() if '==' in line
    )
    assert '--python-version 3.12 ' in calls
    for name in ('mmengine', 'mmcv-lite', 'mmsegmentation', 'mmdet'):
        assert f' {name}=={pins[name]}' in calls
    assert f' opencv-python-headless=={pins["opencv-python"]}' in calls
    assert ' torch' not in calls


@pytest.mark.parametrize('given', [[], ['--help'], ['wheels', '312']])
def test_wrong_arguments_are_refused(given, tmp_path):
    result, calls = collect(tmp_path, *given)
    assert result.returncode == 2
    assert result.stderr
    assert not calls
