"""``dist_train.sh`` and ``dist_test.sh`` on the demo, without a GPU, in folders with spaces."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import ROOT, passed, tool
from test_command_lines import DEMO, options

from mmvim.datasets.shapes import write_ade20k

pytestmark = pytest.mark.slow


def script(name: str, *arguments) -> subprocess.CompletedProcess:
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        port = listener.getsockname()[1]
    settings = dict(PORT=str(port), PYTHON=sys.executable, CUDA_VISIBLE_DEVICES='')
    command = ['bash', str(ROOT / 'tools' / name), *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)


def test_two_processes_train_and_test_the_demo(tmp_path):
    folder = tmp_path / 'a folder'
    write_ade20k(tmp_path / 'shapes', train=6, val=3, size=64)
    config = Path(shutil.copytree(ROOT / 'configs', folder / 'configs'), 'vim', Path(DEMO).name)
    # Three pictures on two processes: one is tested twice and must count once.
    settings = options(tmp_path / 'shapes', train_cfg__max_iters=2, train_cfg__val_interval=2)
    output = passed(script('dist_train.sh', config, 2, '--work-dir', folder / 'run', *settings))
    assert 'batch norm is not synchronised' in output
    checkpoint = folder / 'run/iter_2.pth'

    def tested(run, *processes) -> float:
        work_dir = folder / run.__name__
        passed(run(*processes, '--work-dir', work_dir, *settings))
        return json.loads(next(work_dir.glob('*/*.json')).read_text())['mIoU']

    def together(*arguments):
        return script('dist_test.sh', config, checkpoint, 2, *arguments)

    def alone(*arguments):
        return tool('test.py', config, checkpoint, *arguments)

    assert tested(together) == pytest.approx(tested(alone), abs=0.01)


def test_the_scripts_say_how_they_are_used():
    for name in ('dist_train.sh', 'dist_test.sh'):
        result = script(name, DEMO)
        assert result.returncode == 2 and 'usage: ' in result.stderr
