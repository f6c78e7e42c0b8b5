"""tools/benchmark.py: what it writes, how it compares, and that memory running out is a result."""

import importlib.util
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_line import ROOT, passed, tool

from mmvim.benchmark import report
from mmvim.benchmark.instruction_sets import ENVIRONMENTS, environment
from mmvim.benchmark.subjects import MODEL_NAMES, Subject
from mmvim.benchmark.worker import OUT_OF_MEMORY, Result, Worker, prepare
from mmvim_ops.backends.cpp.library import instruction_sets


def results():
    subject = Subject('vim-tiny', 'backbone', 512)
    slow = replace(subject, model='deit-tiny-explicit')
    return [
        Result(subject, times=[0.1, 0.2, 0.3], memory=2**20, parameters=7_000_000, tokens=1024),
        Result(slow, status=OUT_OF_MEMORY),
    ]


def test_table_gives_medians_spread_and_ratios():
    header, table = report.rows(results())
    cells = dict(zip(header, table[0], strict=True))
    assert cells['ms'] == '200.0'
    assert cells['images/s'] == '5'
    assert cells['spread'] == '±50%'
    assert cells['memory MiB'] == '1'
    assert dict(zip(header, table[1], strict=True))['images/s'] == OUT_OF_MEMORY

    before = [replace(results()[0], times=[0.4], memory=2**21)]
    header, table = report.rows(results(), before)
    cells = dict(zip(header, table[0], strict=True))
    assert cells['speed / baseline'] == '2.00'
    assert cells['memory / baseline'] == '0.50'
    assert dict(zip(header, table[1], strict=True))['speed / baseline'] == ''


def settings():
    """The same model and size forward and in training, eager and as a graph."""
    first = results()[0]
    return [
        replace(first, subject=replace(first.subject, mode=mode, run=run))
        for mode in ('forward', 'train')
        for run in ('eager', 'graph')
    ]


def test_each_setting_has_a_table_and_a_baseline_of_its_own():
    tables = report.by_setting([*settings(), *results()])
    assert list(tables) == [
        *('forward, fp32, eager', 'forward, fp32, graph'),
        *('train, fp32, eager', 'train, fp32, graph'),
    ]
    assert [len(some) for some in tables.values()] == [3, 1, 1, 1]
    before = [replace(result, times=[0.4]) for result in settings()[1:3]]
    found = []
    for some in tables.values():
        header, table = report.rows(some, before)
        found.append(dict(zip(header, table[0], strict=True))['speed / baseline'])
    assert found == ['', '2.00', '2.00', '']

    text = report.markdown([*settings(), *results()], before, {'machine': 'a'})
    *_, forward, graph, train, last = text.split('## ')
    assert [forward.count('vim-tiny'), forward.count('deit-tiny-explicit')] == [2, 1]
    assert train.startswith('train, fp32, eager\n\n| model |')
    assert ['2.00' in some for some in (forward, graph, train, last)] == [False, True, True, False]


def test_results_come_back_from_json(tmp_path):
    path = tmp_path / 'benchmark.json'
    report.save(path, results(), {'machine': 'a'})
    assert report.load(path) == (results(), {'machine': 'a'})
    for content in ('{', '[]', '{"results": [{"subject": {"bogus": 1}}], "machine": {}}'):
        path.write_text(content)
        with pytest.raises(ValueError, match='no result of this benchmark'):
            report.load(path)


@pytest.mark.parametrize('measured', [results(), [*settings(), *results()], []])
def test_plot(measured, tmp_path):
    report.plot(tmp_path / 'plot.png', measured, 'title')
    assert (tmp_path / 'plot.png').stat().st_size > 1000


def test_both_kinds_of_attention_are_named():
    assert {'deit-tiny-fused', 'deit-tiny-explicit', 'vim-tiny'} <= set(MODEL_NAMES)


def benchmark():
    """The command line tool as a module."""
    spec = importlib.util.spec_from_file_location('benchmark_tool', ROOT / 'tools/benchmark.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FakeWorker:
    """Runs out of memory with explicit attention from side 64 on, and where another still has
    memory of the size before."""

    started = 0
    sizes: dict = {}  # that each worker has memory of

    def __init__(self, *_):
        FakeWorker.started += 1
        self.closed = False

    def prepare(self, subject):
        assert not self.closed
        assert not set(self.sizes.values()) - {subject.size}
        self.sizes[self] = subject.size
        fails = subject.model.endswith('explicit') and subject.size >= 64
        self.result = Result(subject, status=OUT_OF_MEMORY if fails else 'ok')

    def step(self):
        if self.result.status == 'ok':
            self.result.times.append(1.0)

    def release(self):
        del self.sizes[self]

    def close(self):
        self.release()
        self.closed = True


def test_each_instruction_set_is_a_row_of_its_own():
    some = results()[0]
    held = [replace(some, subject=replace(some.subject, isa=isa)) for isa in ('avx512', 'avx2')]
    header, table = report.rows(held, [some, replace(held[1], times=[0.4])])
    cells = [dict(zip(header, row, strict=True)) for row in table]
    assert [row['ISA'] for row in cells] == ['avx512', 'avx2']
    assert [row['speed / baseline'] for row in cells] == ['', '2.00']


def test_everything_in_a_process_is_held_to_the_instruction_set(monkeypatch):
    monkeypatch.setenv('MMVIM_OPS_ISA', 'mine')
    names = set().union(*ENVIRONMENTS.values()) - {'MMVIM_OPS_ISA'}
    for name in names:
        monkeypatch.delenv(name, raising=False)
    with environment('avx2'):
        assert os.environ['MMVIM_OPS_ISA'] == os.environ['ATEN_CPU_CAPABILITY'] == 'avx2'
        assert names <= set(os.environ)
    assert os.environ['MMVIM_OPS_ISA'] == 'mine'
    assert not names & set(os.environ)
    with environment(''):
        assert os.environ['MMVIM_OPS_ISA'] == 'mine'


@pytest.mark.slow
@pytest.mark.skipif('portable' not in instruction_sets(), reason='the cpp backend is missing')
def test_a_worker_computes_by_the_instruction_set():
    worker = Worker(threads=1, limit=None, warm_up=1, isa='portable')
    try:
        worker.prepare(Subject('vim-tiny', 'backbone', 32, isa='portable'))
        assert worker.result.status == 'ok'
        environ = Path(f'/proc/{worker.process.pid}/environ')
        if environ.exists():  # Linux
            assert b'MMVIM_OPS_ISA=portable' in environ.read_bytes().split(b'\0')
    finally:
        worker.close()


@pytest.mark.parametrize(('device', 'started'), [('cuda', 3), ('cpu', 6)])
def test_processes_are_kept_on_a_gpu_until_they_fail(device, started, monkeypatch):
    module = benchmark()
    monkeypatch.setattr(module, 'Worker', FakeWorker)
    monkeypatch.setattr(FakeWorker, 'started', 0)
    monkeypatch.setattr(FakeWorker, 'sizes', {})
    args = SimpleNamespace(
        device=device, threads=1, memory_limit=1, warm_up=1, repeat=2, max_seconds=9
    )
    workers, found = [None, None], []
    for size in (48, 64, 128):
        subjects = [Subject(m, 'backbone', size) for m in ('vim-tiny', 'deit-tiny-explicit')]
        found += module.measure(subjects, workers, args, lambda *_: None)
    if device == 'cuda':  # the last one that failed is not started again
        assert [worker is None for worker in workers] == [False, True]
        assert FakeWorker.started == 1 + 2
    else:
        assert workers == [None, None]
    assert FakeWorker.started == started
    assert [r.status for r in found] == ['ok', 'ok', *['ok', OUT_OF_MEMORY] * 2]
    assert [len(r.times) for r in found] == [2, 2, 2, 0, 2, 0]


@pytest.mark.parametrize(('device', 'most'), [('cuda', 2), ('cpu', 16)])
def test_one_process_of_a_model_serves_every_setting_on_a_gpu(device, most, monkeypatch):
    module = benchmark()
    monkeypatch.setattr(module, 'Worker', FakeWorker)
    monkeypatch.setattr(FakeWorker, 'started', 0)
    monkeypatch.setattr(FakeWorker, 'sizes', {})
    args = SimpleNamespace(device=device, threads=1, memory_limit=1, warm_up=1, repeat=2)
    args.max_seconds = 9
    args.models, args.sizes, args.isa = ['vim-tiny', 'deit-tiny-fused'], [48, 32, 48], None
    args.part, args.batch_size = 'backbone', 1
    args.mode, args.dtype, args.run = ['forward', 'train'], ['fp32', 'bf16', 'fp32'], ['eager']
    groups = module.subjects_of(args)
    assert [(g[0].size, g[0].setting) for g in groups] == [
        (size, f'{mode}, {dtype}, eager')
        for size in (32, 48)
        for mode in ('forward', 'train')
        for dtype in ('fp32', 'bf16')
    ]
    workers, found = [None, None], []
    module.start_together(groups[0], workers, args)
    assert FakeWorker.started == (2 if device == 'cuda' else 0)
    for group in groups:
        found += module.measure(group, workers, args, lambda *_: None)
    assert FakeWorker.started == most
    assert [r.subject for r in found] == [subject for group in groups for subject in group]
    assert all(len(r.times) == 2 for r in found)


def test_a_whole_model_cannot_be_a_graph(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    given = ['--device', 'cuda', '--run', 'graph', '--mode', 'train']
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', *given, '--part', 'pyramid'])
    benchmark().parse_args()
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', *given, '--part', 'segmentor'])
    with pytest.raises(SystemExit):
        benchmark().parse_args()
    assert '--part backbone or pyramid' in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize('mode', ['forward', 'train'])
def test_a_segmentor_takes_a_step_at_any_size(mode):
    step, result = prepare(Subject('vim-tiny', 'segmentor', 64, mode, batch_size=2), warm_up=1)
    assert result.tokens == 16
    trained = [p.grad is not None for p in step.model.backbone.parameters()]
    assert any(trained) == (mode == 'train')


@pytest.mark.slow
def test_a_process_takes_one_subject_after_the_other():
    subject = Subject('vim-tiny', 'backbone', 32)
    worker = Worker(threads=1, limit=None, warm_up=1, first=subject)
    try:
        for size, mode, dtype in ((32, 'forward', 'fp32'), (48, 'train', 'bf16')):
            worker.prepare(replace(subject, size=size, mode=mode, dtype=dtype))
            worker.step()
            assert worker.result.status == 'ok'
            assert worker.result.subject.setting == f'{mode}, {dtype}, eager'
            assert worker.result.tokens == (size // 16) ** 2
            assert len(worker.result.times) == 1
            measured = worker.result
            worker.release()
            assert (measured.status, len(measured.times)) == ('ok', 1)
            assert worker.result.status == 'ok'
    finally:
        worker.close()


@pytest.mark.slow
def test_what_fails_before_a_subject_is_asked_for_is_its_status():
    subject = Subject('vim-giant', 'backbone', 32)
    worker = Worker(threads=1, limit=None, warm_up=1, first=subject)
    try:
        worker.process.join()
        worker.prepare(subject)
        assert 'giant' in worker.result.status
        assert worker.result.subject == subject
    finally:
        worker.close()


@pytest.mark.slow
def test_every_setting_is_measured_in_one_command(tmp_path):
    subject = Subject('vim-tiny', 'backbone', 32)
    trained = replace(subject, mode='train', dtype='bf16')
    before = [Result(s, times=[1.0], memory=2**20, tokens=4) for s in (subject, trained)]
    report.save(tmp_path / 'before.json', before, {})
    given = ['--models', 'vim-tiny', '--sizes', '32', '--mode', 'forward', 'train']
    given += ['--dtype', 'fp32', 'bf16', '--repeat', '2', '--warm-up', '1', '--threads', '1']
    given += ['--baseline', tmp_path / 'before.json', '--out', tmp_path]
    output = passed(tool('benchmark.py', *given))

    found, _ = report.load(tmp_path / 'benchmark.json')
    assert [(r.subject.mode, r.subject.dtype) for r in found] == [
        *(('forward', 'fp32'), ('forward', 'bf16'), ('train', 'fp32'), ('train', 'bf16'))
    ]
    assert [(r.status, len(r.times)) for r in found] == [('ok', 2)] * 4
    tables = (tmp_path / 'benchmark.md').read_text().split('## ')[1:]
    known = []
    for table, result in zip(tables, found, strict=True):
        heading, _, header, _, row = table.strip().splitlines()
        assert heading == result.subject.setting
        assert f'{heading}, cpu' in output
        cells = dict(zip(header.split(' | '), row.split(' | '), strict=True))
        known.append(bool(cells['speed / baseline']))
    assert known == [True, False, False, True]
    assert (tmp_path / 'benchmark.png').exists()


@pytest.mark.slow
def test_end_to_end(tmp_path):
    common = ['--sizes', '48', '--repeat', '2', '--warm-up', '1', '--threads', '1']
    models = ['--models', 'vim-tiny', 'deit-tiny-explicit']
    passed(tool('benchmark.py', *models, *common, '--out', tmp_path))
    vim, deit = (r for r in report.load(tmp_path / 'benchmark.json')[0])
    assert vim.status == deit.status == 'ok'
    assert len(vim.times) == len(deit.times) == 2
    assert vim.tokens == 9
    assert vim.memory > 0
    assert vim.flops > 9 * 2 * 6e6  # about two per parameter and token
    assert 'python' in (tmp_path / 'benchmark.md').read_text()

    again = tmp_path / 'again'
    baseline = ['--baseline', tmp_path / 'benchmark.json']
    train = ['--mode', 'train', '--part', 'pyramid', '--models', 'vim-tiny']
    passed(tool('benchmark.py', *train, *common, '--out', again, *baseline))
    assert 'speed / baseline' in (again / 'benchmark.md').read_text()


@pytest.mark.slow
def test_out_of_memory_is_a_result(tmp_path):
    given = ['--models', 'deit-tiny-explicit', '--sizes', '2048', '--memory-limit', '1']
    passed(tool('benchmark.py', *given, '--repeat', '1', '--out', tmp_path))
    data = json.loads((tmp_path / 'benchmark.json').read_text())
    assert [entry['status'] for entry in data['results']] == [OUT_OF_MEMORY]


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        (['--run', 'graph', '--device', 'cpu'], '--run graph needs --device cuda'),
        (['--run', 'eager', 'graph', '--device', 'cpu'], '--run graph needs --device cuda'),
        (['--mode', 'forward', 'backward'], 'argument --mode: invalid choice'),
        (['--dtype'], 'argument --dtype: expected at least one argument'),
        (['--batch-size', 'many'], "--batch-size must be a positive number or 'max'"),
        (['--batch-size', '0'], "--batch-size must be a positive number or 'max'"),
        (['--sizes', '8'], '--sizes must be at least one patch'),
        (['--isa', 'avx512', '--device', 'cuda'], '--device cuda'),
        (['--baseline', 'missing.json'], '--baseline'),
    ],
)
def test_bad_arguments(given, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', *given])
    with pytest.raises(SystemExit):
        benchmark().parse_args()
    assert message in capsys.readouterr().err
