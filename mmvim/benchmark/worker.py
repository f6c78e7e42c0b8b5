"""A process of its own for each model, so that one that runs out of memory takes nothing along.

Workers hold their subjects and wait; the parent lets them run one step in turn, so that a machine
that slows down slows all of them down.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
import signal
import time
import traceback
import warnings
from dataclasses import asdict, dataclass, field, replace

import torch

from ..utils.measure import PeakMemory
from .instruction_sets import environment
from .subjects import Step, Subject

__all__ = ['Result', 'Worker']

OUT_OF_MEMORY = 'out of memory'
# What torch says on the CPU, and Linux through Python.
MEMORY_WORDS = ("can't allocate memory", 'Cannot allocate memory', 'not enough memory')


@dataclass
class Result:
    """What is known of a subject.

    Args:
        subject (Subject): The subject; its batch size is the one that was run.
        status (str): ``'ok'``, ``'out of memory'``, or what went wrong.
        times (list[float]): Seconds of each timed step.
        memory (int | None): Peak bytes of a step beyond what model and images take; None where the
            system does not tell.
        parameters (int | None): Of the model.
        flops (int | None): Of a forward pass of one image.
        tokens (int | None): Length of one image's sequence.
    """

    subject: Subject
    status: str = 'ok'
    times: list[float] = field(default_factory=list)
    memory: int | None = None
    parameters: int | None = None
    flops: int | None = None
    tokens: int | None = None

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> Result:
        return cls(**{**data, 'subject': Subject(**data['subject'])})


def is_out_of_memory(error: BaseException) -> bool:
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or any(words in str(error) for words in MEMORY_WORDS)


def limit_memory(limit: int | None) -> None:
    """Let this process have so many bytes more than it has now; asking for more is an error.

    Linux only: other systems have no such limit, or do not keep it.
    """
    if limit is not None:
        import resource

        used = PeakMemory.status('VmSize')
        resource.setrlimit(resource.RLIMIT_AS, (used + limit, resource.RLIM_INFINITY))


def warm_libraries(subject: Subject) -> None:
    """Run something small, so that loading libraries is not counted as the step's memory."""
    run_once(replace(subject, part='backbone', size=64, batch_size=1, run='eager'))


@functools.cache  # a process that serves many sizes needs it once for each mode and dtype
def run_once(subject: Subject) -> None:
    Step(subject)()


def largest_step(subject: Subject) -> Step:
    """The step with the largest power of two as its batch size that fits."""
    step = Step(replace(subject, batch_size=1))
    step()
    while True:
        try:
            larger = Step(replace(subject, batch_size=2 * step.subject.batch_size))
            larger()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return step
        step = larger


def prepare(subject: Subject, warm_up: int) -> tuple[Step, Result]:
    """Build the step and learn all but its time."""
    warm_libraries(subject)
    if subject.batch_size == 0:
        step = largest_step(subject)
    else:
        step = Step(subject)
    if subject.device == 'cuda':
        torch.cuda.empty_cache()  # others share the GPU
    memory = PeakMemory(subject.device)
    before = memory.reset()
    step()
    peak = None if before is None else memory.peak() - before
    for _ in range(warm_up - 1):
        step()
    result = Result(step.subject, memory=peak, parameters=step.parameters, tokens=step.tokens)
    result.flops = step.count_flops()
    return step, result


def serve(
    pipe, threads: int, limit: int | None, warm_up: int, first: Subject | None = None
) -> None:
    """Run in the worker: answer a Subject with a Result, ``'step'`` with its seconds, and
    ``'release'`` when the subject's memory is free.

    A failure is the last answer.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    warnings.simplefilter('ignore')
    torch.set_num_threads(threads)
    step = None
    try:
        limit_memory(limit)
        if first is not None:
            warm_libraries(first)
        while (asked := pipe.recv()) != 'stop':
            if isinstance(asked, Subject):
                step = None  # frees its memory
                step, answer = prepare(asked, warm_up)
            elif asked == 'release':
                if step.subject.run == 'compile':
                    torch.compiler.reset()  # it gives up on code that it has compiled too often
                step, answer = None, True
                gc.collect()
                torch.cuda.empty_cache()
            else:
                start = time.perf_counter()
                step()
                answer = time.perf_counter() - start
            pipe.send(answer)
    except Exception as error:
        if is_out_of_memory(error):
            pipe.send(OUT_OF_MEMORY)
        else:
            traceback.print_exc()
            pipe.send(f'{type(error).__name__}: {str(error).splitlines()[0]}')


class Worker:
    """The parent's side of a process that runs one subject at a time.

    Args:
        threads (int): Of torch.
        limit (int | None): Bytes of memory, not of a GPU, that the process may ask for.
        warm_up (int): Steps before the first timed one.
        isa (str): Instruction set that the process is held to, or ``''``; its subjects' own.
        first (Subject | None): A subject to load libraries for at once, without being asked, so
            that workers that are started together do that side by side.
    """

    result: Result  # of the subject that was prepared last

    def __init__(
        self,
        threads: int,
        limit: int | None,
        warm_up: int,
        isa: str = '',
        first: Subject | None = None,
    ) -> None:
        context = multiprocessing.get_context('spawn')
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=serve, args=(theirs, threads, limit, warm_up, first), daemon=True
        )
        with environment(isa):
            self.process.start()
        theirs.close()

    def _ask(self, what: Subject | str):
        """The answer, or None once nothing more is to be had from the process."""
        try:
            with contextlib.suppress(OSError):  # it may have failed before, and said so
                self.pipe.send(what)
            answer = self.pipe.recv()
        except (EOFError, OSError):  # Linux ends processes that it has no memory for
            self.process.join()
            killed = self.process.exitcode == -9  # SIGKILL, which Windows does not name
            answer = OUT_OF_MEMORY if killed else f'process ended with {self.process.exitcode}'
        if isinstance(answer, str):
            self.result.status = answer
            return None
        return answer

    def prepare(self, subject: Subject) -> None:
        """Take a subject in place of the one before; a batch size of 0: the largest that fits.

        Where that failed the process has ended, and takes no further one.
        """
        self.result = Result(subject)
        self.result = self._ask(subject) or self.result

    def step(self) -> None:
        """Run and time one step, if nothing is in the way."""
        if self.result.status == 'ok':
            seconds = self._ask('step')
            if seconds is not None:
                self.result.times.append(seconds)

    def release(self) -> None:
        """Let the subject go. On a GPU its memory is there for the subjects of others."""
        self.result = Result(self.result.subject)  # what was measured stays as it is
        self._ask('release')

    def close(self, patience: float = 10) -> None:
        """End the process, by force where it takes longer than ``patience`` seconds."""
        with contextlib.suppress(OSError):
            self.pipe.send('stop')
        self.process.join(timeout=patience)
        if self.process.is_alive():
            self.process.kill()
        self.pipe.close()
