"""Speed, memory and growth of Vim beside DeiT, on whatever machine this is.

    python tools/benchmark.py                                   # tiny models, forward
    python tools/benchmark.py --mode forward train --sizes 224 512
    python tools/benchmark.py --part detector --sizes 1024
    python tools/benchmark.py --isa avx512 avx2                 # the same on less of a processor
    python tools/benchmark.py --device cuda --dtype bf16 --run eager graph --batch-size 64
    python tools/benchmark.py --huge                            # up to 16384 x 16384, Vim only

--mode, --dtype and --run take several values, and every combination of them is measured: at each
size one combination after the other, each with a table of its own. Every model has a process of its
own for all of them, on the CPU a new one at each size and combination. The models of a combination
take turns, one step each, and the median over the turns is given, with half of the range as its
spread. The peak memory is that of the first step, beyond what the model and the images take; on the
CPU, only Linux tells it. A model that runs out of memory is reported as such and the others go on.
DeiT is measured with torch's fused attention and with an explicit softmax, which stores the
attention matrix, as the Vim paper did.
--isa holds all that computes to an instruction set: mmvim_ops, torch, oneDNN and MKL.

Writes benchmark.json, benchmark.md and benchmark.png to --out.
"""

import argparse
import datetime
import itertools
import platform
import shlex
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TimeElapsedColumn
from rich.table import Table

from mmvim.benchmark import report
from mmvim.benchmark.instruction_sets import ENVIRONMENTS
from mmvim.benchmark.subjects import DTYPES, MODEL_NAMES, PARTS, Subject
from mmvim.benchmark.worker import Result, Worker
from mmvim.utils.measure import PROC, PeakMemory, processor, read_bytes
from mmvim_ops import available_backends
from mmvim_ops.backends.cpp import library

GIB = 2**30
SIZES = [224, 512, 640, 738, 1024, 1248, 2048]
HUGE = [4096, 8192, 16384]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    tiny = ['vim-tiny', 'deit-tiny-fused', 'deit-tiny-explicit']
    add('--models', nargs='+', default=tiny, choices=MODEL_NAMES, help=f'default: {tiny}')
    add('--part', choices=PARTS, default='backbone', help='how much of it (default: %(default)s)')
    add('--sizes', type=int, nargs='+', default=SIZES, help='image sides (default: %(default)s)')
    add('--huge', action='store_true', help=f'only Vim, one step each, at sides {HUGE}')
    modes = ['forward', 'train']
    add('--mode', nargs='+', choices=modes, default=['forward'], help='default: forward')
    add('--batch-size', default='1', help="images, or 'max': the largest power of two that fits")
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='cpu or cuda')
    dtypes = dict(nargs='+', choices=DTYPES, default=['fp32'])
    add('--dtype', **dtypes, help='default: fp32; bf16 and fp16 are autocast')
    runs = dict(nargs='+', choices=['eager', 'compile', 'graph'], default=['eager'])
    add('--run', **runs, help='default: eager; or torch.compile or a CUDA graph')
    add('--isa', nargs='+', choices=ENVIRONMENTS, help='on the CPU: instruction sets to use')
    add('--threads', type=int, default=torch.get_num_threads(), help='on the CPU: %(default)s')
    add('--repeat', type=int, default=7, help='timed steps of each (default: %(default)s)')
    add('--warm-up', type=int, default=2, help='steps before them (default: %(default)s)')
    add(
        *('--max-seconds',),
        type=float,
        default=120,
        help='no further steps of a model at a size after this long (default: %(default)s)',
    )
    add('--memory-limit', type=float, help='GiB on the CPU (default: 9/10 of what is available)')
    add('--out', type=Path, default=Path('work_dirs/benchmark'), help='folder (%(default)s)')
    add('--baseline', type=Path, help='benchmark.json of an earlier run to compare with')
    args = parser.parse_args()
    check(parser, args)
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what cannot be measured before anything is."""
    if args.device not in ('cpu', 'cuda'):
        parser.error(f'--device must be cpu or cuda, got {args.device}')
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: torch finds no GPU here')
    limited = args.memory_limit is not None or args.batch_size == 'max'
    if args.device == 'cpu' and limited and PeakMemory.status('VmSize') is None:
        parser.error(
            '--memory-limit and --batch-size max limit the memory of a process, which needs Linux; '
            f'this is {platform.system()}'
        )
    if args.isa:
        present = library.instruction_sets()
        if args.device != 'cpu' or not set(args.isa) <= set(present):
            parser.error(
                f'--isa needs --device cpu and instruction sets that backend cpp has here: '
                f'{", ".join(present) or "none"}; got {args.device} and {", ".join(args.isa)}'
            )
    capturable = args.device == 'cuda' and args.part in ('backbone', 'pyramid')
    if 'graph' in args.run and not capturable:
        parser.error('--run graph needs --device cuda and --part backbone or pyramid')
    if args.batch_size != 'max' and not (args.batch_size.isdecimal() and int(args.batch_size)):
        parser.error(f"--batch-size must be a positive number or 'max', got {args.batch_size}")
    args.batch_size = 0 if args.batch_size == 'max' else int(args.batch_size)
    for name in ('repeat', 'warm_up', 'threads'):
        if getattr(args, name) < 1:
            parser.error(f'--{name.replace("_", "-")} must be at least 1')
    if min(args.sizes) < 16:
        parser.error(f'--sizes must be at least one patch (16), got {min(args.sizes)}')
    if args.baseline is not None:
        try:
            args.baseline, _ = report.load(args.baseline)
        except (OSError, ValueError) as error:
            parser.error(f'--baseline: {error}')
    if args.huge:
        args.sizes, args.repeat, args.warm_up = HUGE, 1, 1
        args.models = [name for name in args.models if name.startswith('vim')] or ['vim-tiny']


def subjects_of(args: argparse.Namespace) -> list[list[Subject]]:
    """Those of one size and combination together.

    Small sizes first, so that a run that is stopped knows them of every combination.
    """
    given = (sorted(args.sizes), args.mode, args.dtype, args.run)
    return [
        [
            Subject(model, args.part, size, mode, args.batch_size, args.device, dtype, run, isa)
            for isa in args.isa or ['']
            for model in args.models
        ]
        for size, mode, dtype, run in itertools.product(*map(dict.fromkeys, given))
    ]


def memory_limit(args: argparse.Namespace) -> int | None:
    """Bytes that a process may ask for; None where the system does not tell what there is."""
    if args.memory_limit is not None:
        return int(args.memory_limit * GIB)
    path = PROC / 'meminfo'
    if not path.exists():
        return None
    return read_bytes(path, 'MemAvailable') * 9 // 10


def start_worker(subject: Subject, args: argparse.Namespace) -> Worker:
    on_cpu = args.device == 'cpu'
    limit, first = (memory_limit(args), None) if on_cpu else (None, subject)
    return Worker(args.threads, limit, args.warm_up, subject.isa, first)


def start_together(
    subjects: list[Subject], workers: list[Worker | None], args: argparse.Namespace
) -> None:
    """Start those that are missing on a GPU, whose minutes are short; on the CPU, processes that
    start beside one that is measured would disturb it."""
    if args.device == 'cuda':
        for index, subject in enumerate(subjects):
            workers[index] = workers[index] or start_worker(subject, args)


def measure(
    subjects: list[Subject], workers: list[Worker | None], args: argparse.Namespace, advance
) -> list[Result]:
    """Take turns until all have ``args.repeat`` times.

    Args:
        subjects (list[Subject]): Those of one size and combination.
        workers (list[Worker | None]): One for each, or None where it has to be started; those that
            are left at the end can be used again.
    """
    start_together(subjects, workers, args)
    for index, subject in enumerate(subjects):
        advance(f'{label(subject)}: first step', 0)
        workers[index] = workers[index] or start_worker(subject, args)
        workers[index].prepare(subject)
    for turn in range(args.repeat):
        for worker in workers:
            times = worker.result.times
            advance(label(worker.result.subject), 1)
            if turn == 0 or sum(times) < args.max_seconds:
                worker.step()
    results = [worker.result for worker in workers]
    for index, worker in enumerate(workers):
        if args.device == 'cpu' or worker.result.status != 'ok':
            worker.close()
            workers[index] = None
        else:
            worker.release()
    return results


def label(subject: Subject) -> str:
    return f'{subject.model} at {subject.size}, {subject.setting}'


def machine(args: argparse.Namespace) -> dict:
    """What the figures depend on."""
    torch.set_num_threads(args.threads)
    return {
        'command': shlex.join(['python', *sys.argv]),
        'date': datetime.date.today().isoformat(),
        'machine': processor(args.device),
        'versions': f'torch {torch.__version__}, Python {platform.python_version()}',
        'backends of the scan': ', '.join(available_backends()),
        'instruction sets': f'{", ".join(library.instruction_sets())}; used: '
        f'{", ".join(args.isa or ["the best"])}',
    }


def show(console: Console, results: list[Result], args: argparse.Namespace) -> None:
    for setting, some in report.by_setting(results).items():
        header, cells = report.rows(some, args.baseline or ())
        table = Table(*header, box=None, title=f'{setting}, {args.device}')
        for row in cells:
            table.add_row(*row)
        console.print(table)


def main() -> None:
    args = parse_args()
    start = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    groups, results = subjects_of(args), []
    workers: list[Worker | None] = [None] * len(groups[0])
    start_together(groups[0], workers, args)  # while this process asks for the machine
    console, about = Console(), machine(args)
    if not console.is_terminal:
        console.width = 150
    bar = Progress(
        *(SpinnerColumn(), *Progress.get_default_columns()[:2]),
        *(MofNCompleteColumn(), TimeElapsedColumn()),
        console=console,
    )
    with bar:
        task = bar.add_task('', total=sum(map(len, groups)) * args.repeat)

        def advance(text: str, steps: int) -> None:
            bar.update(task, description=text, advance=steps)

        stopped = False
        try:
            for group in groups:
                results += measure(group, workers, args, advance)
                report.save(args.out / 'benchmark.json', results, about)
        except KeyboardInterrupt:  # what is known so far is still shown
            stopped = True
        finally:
            for worker in filter(None, workers):
                worker.close(patience=0 if stopped else 10)
    show(console, results, args)
    about['time of the whole run'] = f'{time.perf_counter() - start:.0f} s'
    report.save(args.out / 'benchmark.json', results, about)
    text = report.markdown(results, args.baseline or [], about)
    (args.out / 'benchmark.md').write_text(text, encoding='utf-8')
    report.plot(args.out / 'benchmark.png', results, f'{args.part}, {about["machine"]}')
    console.print(f'benchmark.json, benchmark.md and benchmark.png are in {args.out}')
    failed = [r for r in results if r.status not in ('ok', 'out of memory')]
    for result in failed:
        console.print(f'{label(result.subject)}: {result.status}')
    if stopped:
        sys.exit('stopped: what comes after these was not measured')
    sys.exit(1 if failed else 0)


if __name__ == '__main__':
    main()
