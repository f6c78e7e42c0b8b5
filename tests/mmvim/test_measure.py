"""Measurements say what they do not know on systems other than Linux."""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mmvim.benchmark import report
from mmvim.benchmark.subjects import Subject
from mmvim.benchmark.worker import prepare
from mmvim.utils import measure

TOOLS = Path(__file__).parents[2] / 'tools'


def tool(name: str):
    """A command line tool as a module."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, TOOLS / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=['Darwin', 'Windows'])
def system(request, monkeypatch, tmp_path) -> str:
    """Neither Linux nor its /proc."""
    monkeypatch.setattr(measure, 'PROC', tmp_path / 'no_proc')
    monkeypatch.setattr('platform.system', lambda: request.param)
    monkeypatch.setattr('platform.processor', lambda: 'Family 6 Model 1')
    monkeypatch.setattr('ctypes.CDLL', None)  # there is no libc to be asked
    found = subprocess.CompletedProcess([], 0, stdout='Apple M2\n')
    monkeypatch.setattr('subprocess.run', lambda *args, **kwargs: found)
    return request.param


def test_the_processor_is_named(system):
    name = {'Darwin': 'Apple M2', 'Windows': 'Family 6 Model 1'}[system]
    assert measure.processor('cpu').startswith(f'{name}, ')


def test_memory_is_unknown(system):
    memory = measure.PeakMemory('cpu')
    assert memory.reset() is None and memory.peak() is None
    assert measure.mebibytes(None) == f'{system} does not tell'
    assert measure.mebibytes(3 * 2**20) == '3 MiB'


def test_a_benchmark_leaves_memory_out(system, tmp_path):
    subject = Subject('vim-tiny', 'backbone', 32)
    _, result = prepare(subject, warm_up=1)
    result = replace(result, times=[0.1])
    assert result.status == 'ok' and result.memory is None and result.parameters > 0
    header, rows = report.rows([result])
    assert dict(zip(header, rows[0], strict=True))['memory MiB'] == ''
    report.plot(tmp_path / 'plot.png', [result], 'title')


@pytest.mark.parametrize('given', [['--memory-limit', '1'], ['--batch-size', 'max']])
def test_a_benchmark_cannot_limit_memory(system, given, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', '--device', 'cpu', *given])
    with pytest.raises(SystemExit):
        tool('benchmark.py').parse_args()
    assert f'needs Linux; this is {system}' in capsys.readouterr().err


def test_step_memory_gives_the_time_alone(system, monkeypatch, capsys):
    config = TOOLS.parent / 'configs/vim/vim-demo_upernet_shapes-128x128.py'
    arguments = [str(config), '--size', '64', '--batch-size', '1', '--steps', '1', '--mode', 'test']
    monkeypatch.setattr(sys, 'argv', ['step_memory.py', *arguments])
    tool('analysis_tools/step_memory.py').main()
    assert f'peak {system} does not tell above {system} does not tell, ' in capsys.readouterr().out


def test_a_container_may_not_allow_a_new_peak(monkeypatch, tmp_path):
    (tmp_path / 'self').mkdir()
    (tmp_path / 'self/status').write_text('VmRSS:\t 3 kB\nVmHWM:\t 4 kB\n')
    (tmp_path / 'self/clear_refs').mkdir()  # cannot be written
    monkeypatch.setattr(measure, 'PROC', tmp_path)
    assert measure.PeakMemory('cpu').reset() is None
