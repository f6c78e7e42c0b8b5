"""Drills: trainings that are killed while they run. docs/reliability.md says what they prove.

``MMVIM_DRILL_SEED`` sets the moments of the kills; the default is a new one each time, and a
failure names it.
"""

import contextlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from tiny_training import command, config, environment, equal, free_port, train, weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != 'posix', reason='kills process groups'),
]

LENGTH = 120
# A checkpoint of 16 MB, so that a part of the time is spent writing; every other step saves one.
SETTINGS = [
    '--cfg-options',
    'model.ballast=4000000',
    'model.seconds=0.05',
    f'train_cfg.max_iters={LENGTH}',
    f'param_scheduler.0.end={LENGTH}',
    'randomness.seed=5',
]
KILLS = ('anywhere', 'writing', 'anywhere', 'writing', 'anywhere')


class Training:
    """A training in a process group of its own, with its output in a file."""

    def __init__(self, folder: Path, *arguments, processes: int) -> None:
        self.log = folder / f'output_{len(list(folder.glob("output_*")))}.txt'
        self.work_dir = folder / 'run'
        with open(self.log, 'w') as log:
            self.process = subprocess.Popen(
                command(config(folder), self.work_dir, *arguments, processes=processes),
                env={**environment(), 'PORT': str(free_port())},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def output(self) -> str:
        return self.log.read_text()

    def wait_for(self, condition) -> None:
        while not condition():
            assert self.process.poll() is None, f'it ended by itself: {self.output()[-3000:]}'
            time.sleep(0.001)

    def wait_for_steps(self) -> None:
        self.wait_for(lambda: 'Iter(train)' in self.output())

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start(tmp_path):
    """Starts trainings; none outlives the test."""
    started = []

    def start(*arguments, **settings) -> Training:
        started.append(Training(tmp_path, *arguments, **settings))
        return started[-1]

    yield start
    for training in started:
        training.kill()


@pytest.mark.parametrize('processes', [1, 2])
def test_a_training_killed_five_times_ends_bit_equal(tmp_path, start, processes):
    seed = os.environ.get('MMVIM_DRILL_SEED') or str(random.SystemRandom().randrange(10**6))
    moments = random.Random(seed)
    train(config(tmp_path), tmp_path / 'undisturbed', *SETTINGS, processes=processes)
    left = []  # unfinished files that kills left behind
    for kind in KILLS:
        training = start('--resume', *SETTINGS, processes=processes)
        training.wait_for_steps()
        time.sleep(moments.uniform(0, 0.8))
        if kind == 'writing':
            training.wait_for(lambda: any(training.work_dir.glob('*.incomplete')))  # noqa: B023
        training.kill()
        left += training.work_dir.glob('*.incomplete')
    output = train(config(tmp_path), tmp_path / 'run', '--resume', *SETTINGS, processes=processes)
    print(f'MMVIM_DRILL_SEED={seed}: killed while writing {[path.name for path in left]}')
    assert left and 'resumed epoch: 0' in output
    name = f'iter_{LENGTH}.pth'
    assert equal(weights(tmp_path / 'run', name), weights(tmp_path / 'undisturbed', name))
    assert [path.name for path in (tmp_path / 'run').glob('*.pth')] == [name]
    assert not list((tmp_path / 'run').glob('*.incomplete'))


@pytest.mark.parametrize('rank', [0, 1])
def test_one_of_two_workers_killed_ends_both_with_a_message(start, rank):
    training = start(*SETTINGS, processes=2)
    training.wait_for_steps()
    workers = children(training.process.pid)
    assert len(workers) == 2
    os.kill(workers[rank], signal.SIGKILL)
    assert training.process.wait(timeout=60) != 0
    assert f'Signal 9 (SIGKILL) received by PID {workers[rank]}' in training.output()
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)


def test_workers_end_with_their_launcher(start):
    training = start(*SETTINGS, processes=2)
    training.wait_for_steps()
    workers = children(training.process.pid)
    os.kill(training.process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while any(Path(f'/proc/{worker}').exists() for worker in workers):
        assert time.monotonic() < deadline, 'workers outlived their launcher'
        time.sleep(0.01)


def children(process: int) -> list[int]:
    """Processes that a process started, in the order of their ranks."""
    listed = subprocess.run(
        ['ps', '-o', 'pid=', '--ppid', str(process)], capture_output=True, text=True, check=True
    )
    return sorted(map(int, listed.stdout.split()))
