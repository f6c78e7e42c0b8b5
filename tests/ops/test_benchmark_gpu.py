"""ops/benchmark_gpu.py without a GPU: what it computes, and that one failure ends nothing else."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmvim_ops import selective_scan
from mmvim_ops.backends.cuda.cut import Cut

sys.path.insert(0, str(Path(__file__).parents[2] / 'ops'))
import benchmark_gpu
import gpu_candidates
import gpu_timing


def arguments(**more):
    given = dict(batch=2, states=4, backends=['torch'], recompute=['activations'], repeat=2)
    return SimpleNamespace(**{**given, 'mixer': False, 'sweep': False, **more})


@pytest.fixture
def on_cpu(monkeypatch):
    """What needs a GPU stands still: a call takes a second, a graph is the call itself."""
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda: None)
    monkeypatch.setattr(gpu_timing, 'per_call', lambda run, calls: (run(), 1.0)[1])
    monkeypatch.setattr(gpu_timing, 'capture', lambda run: run)
    monkeypatch.setattr(gpu_timing, 'peak_memory', lambda run: 1)
    for name in ('scan_work', 'mixer_work'):
        make = getattr(gpu_candidates, name)
        monkeypatch.setattr(benchmark_gpu, name, partial(make, device='cpu'))


def as_theirs(u, delta, A, B, C, D, z, bias, softplus):
    return selective_scan(u, delta, A, B, C, D, z, bias, softplus, backend='torch')


@pytest.mark.parametrize('mixer', [False, True])
def test_all_candidates_compute_the_same(mixer, on_cpu, monkeypatch):
    monkeypatch.setattr(gpu_candidates, 'find_theirs', lambda: as_theirs)
    rows = list(benchmark_gpu.measure(arguments(mixer=mixer), 64, 50, 'float32'))
    assert {row.backward for row in rows} == {False, True}
    assert len(rows) == (6 if mixer else 4)
    for row in rows:
        assert row.failure is None
        assert row.error < 1e-5
        assert row.ratio == row.ratio_replayed == 1


def test_a_failing_candidate_is_a_row_and_the_others_go_on(on_cpu, monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError('too much\nand more')

    monkeypatch.setattr(gpu_candidates, 'find_theirs', lambda: fails)
    theirs, ours = list(benchmark_gpu.measure(arguments(), 8, 20, 'float32'))[:2]
    assert theirs.failure == 'out of memory: too much'
    assert theirs.time is None
    assert ours.failure is None
    assert ours.time == 1
    assert ours.ratio is None


def test_what_cannot_be_captured_has_a_time(on_cpu, monkeypatch):
    def refuses(run):
        raise RuntimeError('not captured, because')

    monkeypatch.setattr(gpu_timing, 'capture', refuses)
    (row,) = gpu_timing.take_turns({'a': lambda: []}, None, 1)
    assert row.time == 1
    assert row.replayed is None
    assert 'not captured' in row.failure


def test_a_missing_reference_leaves_the_times(on_cpu, monkeypatch):
    monkeypatch.setattr(gpu_candidates, 'find_theirs', lambda: None)
    monkeypatch.setattr(gpu_candidates, 'REFERENCE', 'no such backend')
    reference, row, _ = benchmark_gpu.measure(arguments(), 8, 20, 'float32')
    assert 'no such backend' in reference.failure
    assert row.time == 1
    assert row.error is None


def test_an_output_that_is_no_number_is_no_small_error():
    numbers = torch.ones(3)
    wrong = torch.tensor([1, float('nan'), 1])
    error = gpu_timing.relative_error([numbers, wrong, numbers], [numbers] * 3)
    assert error != error


@pytest.mark.parametrize('sweep', [False, True])
def test_a_lost_gpu_ends_the_run_after_its_row(sweep, tmp_path, monkeypatch, capsys):
    def loses(*_):
        yield (
            benchmark_gpu.Row('good', time=1.0)
            if not sweep
            else dict(dtype='', dim=1, length=1, backward=False, chosen='', times={}, failures={})
        )
        raise gpu_timing.GpuLost('bad', 'illegal address')

    args = arguments(sweep=sweep, dtypes=['float32'], dims=[8], lengths=[20], json=tmp_path / 'a')
    monkeypatch.setattr(benchmark_gpu, 'parse_args', lambda: args)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(benchmark_gpu, 'describe_machine', lambda: {'card': 'a card'})
    monkeypatch.setattr(benchmark_gpu, 'gpu_limits', lambda: (None, 1e9))
    monkeypatch.setattr(benchmark_gpu, 'sweep' if sweep else 'measure', loses)
    assert benchmark_gpu.main() == 1
    data = json.loads((tmp_path / 'a').read_text())
    assert data['machine']['card'] == 'a card'
    assert len(data['results']) == 2
    assert data['results'][1]['failure'] == 'illegal address'
    assert 'without bad' in capsys.readouterr().out


def test_an_error_that_stays_is_a_lost_gpu(monkeypatch):
    def gone():
        raise RuntimeError('CUDA error')

    monkeypatch.setattr(torch.cuda, 'synchronize', gone)
    failures = {}
    with pytest.raises(gpu_timing.GpuLost, match='a: ValueError: first'):  # noqa: SIM117
        with gpu_timing.noting(failures, 'a'):
            raise ValueError('first')
    assert failures == {'a': 'ValueError: first'}


@pytest.mark.parametrize(
    ('said', 'torch_knows', 'expected'),
    [
        ('1980\n', 1000, 1980e6),
        ('1980\n1755\n', 1000, 1980e6),
        ('[N/A]\n', 1755000, 1755e6),
        ('', None, None),
        (None, 1755000, 1755e6),
    ],
)
def test_clock_of_unusual_answers(said, torch_knows, expected, monkeypatch):
    def run(*_, **__):
        if said is None:
            raise FileNotFoundError('nvidia-smi')
        return SimpleNamespace(stdout=said)

    properties = SimpleNamespace(**({} if torch_knows is None else {'clock_rate': torch_knows}))
    monkeypatch.setattr(subprocess, 'run', run)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda _: properties)
    assert gpu_timing.max_clock() == expected


def test_a_row_without_figures_is_printed(capsys):
    benchmark_gpu.print_row(benchmark_gpu.Row('a', failure='why'), None, None)
    assert '–' in (line := capsys.readouterr().out)
    assert 'why' in line


def test_other_cuts_are_printed_and_one_may_fail(monkeypatch, capsys):
    """A pass is cut as told, and the other one into as many chunks."""
    plan, chosen = benchmark_gpu.cuda_plan, Cut(lanes=8, warps=3, chunks=1)

    def timed(run):
        cuts = [plan.choose_cut('sizes', 'device', which) for which in (False, True)]
        seen.append(tuple(cuts))
        if cuts[0] == Cut(8, 1, 2):
            raise RuntimeError('does not fit')
        return 1e-3

    seen = []
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda: None)
    monkeypatch.setattr(benchmark_gpu, 'median_per_call', timed)
    monkeypatch.setattr(plan, 'choose_cut', lambda *given: chosen)
    make = partial(gpu_candidates.scan_tensors, device='cpu')
    monkeypatch.setattr(benchmark_gpu, 'scan_tensors', make)
    forward, backward = benchmark_gpu.sweep(arguments(), 8, 256, 'float32')
    for row in (forward, backward):
        benchmark_gpu.print_sweep(row)
    out = capsys.readouterr().out
    assert '1.000 ms as chosen, 8 x 3 x 1' in out
    assert '4 x 2 x 1 1.000' in out
    assert '8 x 1 x 2: RuntimeError: does not fit' in out
    assert len(forward['failures']) == 1 and not backward['failures']
    assert seen.count((chosen, chosen)) == 2
    assert (Cut(4, 8, 2), chosen._replace(chunks=2)) in seen
    assert (chosen._replace(chunks=2), Cut(4, 8, 2)) in seen
