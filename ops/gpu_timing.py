"""Measuring on a GPU for ops/benchmark_gpu.py: times, graphs, memory, limits, and failures."""

import datetime
import gc
import json
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

EXPONENTIALS_PER_CLOCK = 16  # of a multiprocessor: compute capability 7.0 to 9.0

Run = Callable[[], list[torch.Tensor]]


@dataclass
class Timing:
    """One candidate. Seconds per call, bytes, error relative to the reference; None: not known.

    ``failure`` says why nothing, or not everything, is known.
    """

    name: str
    time: float | None = None
    spread: float | None = None
    replayed: float | None = None
    memory: int | None = None
    error: float | None = None
    failure: str | None = None


class GpuLost(RuntimeError):
    """An error after which the GPU does nothing more for this process.

    Args:
        name (str): The candidate that ran.
        reason (str): What CUDA says.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(f'{name}: {reason}')
        self.name, self.reason = name, reason


def in_one_line(error: BaseException) -> str:
    kind = 'out of memory' if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
    said = str(error).strip().splitlines()
    return f'{kind}: {said[0]}' if said else kind


@contextmanager
def noting(failures: dict[str, str], name: str) -> Iterator[None]:
    """Write an exception down as the failure of this candidate and go on.

    Raises:
        GpuLost: Nothing can go on: the error has ended the process's context on the GPU.
    """
    try:
        yield
    except Exception as error:
        failures[name] = in_one_line(error)
        del error
        try:
            gc.collect()  # a traceback may hold tensors
            torch.cuda.empty_cache()
            torch.cuda.synchronize()
        except RuntimeError:
            raise GpuLost(name, failures[name]) from None


def per_call(run: Callable[[], object], calls: int) -> float:
    """Seconds of one of so many calls without a pause between them."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def median_per_call(run: Callable[[], object], repeat: int = 5) -> float:
    run()
    calls = max(1, int(0.02 / per_call(run, 2)))
    return statistics.median(per_call(run, calls) for _ in range(repeat))


def capture(run: Callable[[], object]) -> Callable[[], None]:
    """The same work as a CUDA graph.

    Raises:
        RuntimeError: It cannot be captured; says why.
    """
    try:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            run()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            run()
    except Exception as error:
        cause = error  # the end of the capture reports a second error
        while cause.__context__ is not None:
            cause = cause.__context__
        raise RuntimeError(f'not captured, {in_one_line(cause)}') from None
    return graph.replay


def peak_memory(run: Callable[[], object]) -> int:
    """The most bytes that a call has allocated at a time."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def relative_error(actual: list, expected: list) -> float:
    """The largest of ‖actual − expected‖ / ‖expected‖; not a number where one is not."""
    errors = [
        (a.float() - e.float()).norm() / e.float().norm().clamp_min(1e-12)
        for a, e in zip(actual, expected, strict=True)
    ]
    return torch.stack(errors).max().item()  # Python's max would pass over one that is no number


def take_turns(
    runs: dict[str, Run], expected: list[torch.Tensor] | None, repeat: int
) -> Iterator[Timing]:
    """Time all candidates, one round of calls each in turn.

    Args:
        runs (dict[str, Run]): Functions that return tensors, by the candidate's name.
        expected (list[Tensor] | None): What they should return; more are allowed.
        repeat (int): Rounds.

    Yields:
        Timing: Of each candidate; of one that fails, too.

    Raises:
        GpuLost: A candidate's error takes all others along.
    """
    failures: dict[str, str] = {}
    errors: dict[str, float] = {}
    calls: dict[str, int] = {}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in runs.items():
        with noting(failures, name):
            out = run()
            if expected is not None:
                errors[name] = relative_error(out, expected[: len(out)])
            del out
            calls[name] = max(1, int(0.02 / per_call(run, 2)))
    for _ in range(repeat):
        for name, run in runs.items():
            if name not in failures:
                with noting(failures, name):
                    times[name].append(per_call(run, calls[name]))
    for name, run in runs.items():
        row = Timing(name, error=errors.get(name), failure=failures.get(name))
        if row.failure is None:
            row.time = statistics.median(times[name])
            row.spread = (max(times[name]) - min(times[name])) / row.time
            with noting(failures, name):
                row.memory = peak_memory(run)
            with noting(failures, name):
                row.replayed = median_per_call(capture(run))
            row.failure = failures.get(name)
        yield row


# The GPU and its limits.


def max_clock() -> float | None:
    """Highest clock of the multiprocessors in Hz; None where neither nvidia-smi nor torch knows."""
    query = ['nvidia-smi', '--query-gpu=clocks.max.sm', '--format=csv,noheader,nounits']
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        said = ''
    found = re.match(r'\s*(\d+)', said)
    if found:
        return float(found.group(1)) * 1e6
    clock = getattr(torch.cuda.get_device_properties(0), 'clock_rate', None)  # kHz
    return 1e3 * clock if clock else None


def gpu_limits() -> tuple[float | None, float | None]:
    """Bytes and exponentials per second; None where it is not known."""
    failures: dict[str, str] = {}
    bandwidth = exponentials = None
    with noting(failures, 'bandwidth'):
        source = torch.empty(1 << 30, dtype=torch.uint8, device='cuda')
        copy = partial(torch.empty_like(source).copy_, source)
        copy()
        bandwidth = 2 * source.numel() / min(per_call(copy, 10) for _ in range(5))
    with noting(failures, 'clock'):
        clock = max_clock()
        if clock is not None:
            processors = torch.cuda.get_device_properties(0).multi_processor_count
            exponentials = EXPONENTIALS_PER_CLOCK * processors * clock
    for name, reason in failures.items():
        print(f'{name} of the GPU: not known, {reason}')
    return bandwidth, exponentials


def driver_version() -> str:
    query = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.split()
    except (OSError, subprocess.SubprocessError):
        said = []
    return said[0] if said else 'not known'


def version_of(module: str) -> str:
    try:
        return getattr(__import__(module), '__version__', 'of unknown version')
    except ImportError:
        return 'not installed'


def describe_machine() -> dict[str, str]:
    """What the figures depend on."""
    return {
        'command': shlex.join(['python', *sys.argv]),
        'date': datetime.datetime.now().isoformat(timespec='minutes'),
        'card': torch.cuda.get_device_name(),
        'driver': driver_version(),
        'torch': torch.__version__,
        'CUDA': str(torch.version.cuda),
        'triton': version_of('triton'),
        'mamba_ssm': version_of('mamba_ssm'),
        'Python': platform.python_version(),
    }


class Record:
    """The rows measured so far, in a file that is whole at any time.

    Args:
        path (Path | None): JSON; None: nothing is written.
        about (dict): Written before the rows.
    """

    def __init__(self, path: Path | None, about: dict):
        self.path, self.about, self.rows = path, about, []

    def add(self, row) -> None:
        """Take a row, a dataclass or a dict, and write all of them."""
        self.rows.append(row if isinstance(row, dict) else asdict(row))
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial_file = self.path.with_suffix('.partial')
            text = json.dumps({'machine': self.about, 'results': self.rows}, indent=1)
            partial_file.write_text(text + '\n', encoding='utf-8')
            partial_file.replace(self.path)
