"""Both directions of a Vim block's scan on a GPU: every backend, beside mamba_ssm's kernel.

    ops/measure_gpu.sh                     # on a bare machine: builds, checks, then runs this
    python ops/benchmark_gpu.py            # this alone
    python ops/benchmark_gpu.py --mixer    # the whole block between its norm and its residual
    python ops/benchmark_gpu.py --sweep    # backend 'cuda', cut in other ways than it chooses

Each candidate computes (y_forward + y_backward) · silu(z) / 2 from the same numbers, forward and
forward + backward. The backends get (batch, length, channels) in memory, as the block has it;
mamba_ssm gets (batch, channels, length), as its kernel wants it, and runs two scans, the second on
flipped copies whose output is flipped back.

With ``--mixer`` it is ``mmvim_ops.mamba_mixer`` with D inner channels, and a block built on
mamba_ssm's scan from torch's operations; ``mamba_ssm/conv`` is that with this library's
convolution. Ratios are to the faster of the two.

Times are per call, from calls that follow each other without a pause; all candidates take turns.
"replayed" is the same from a CUDA graph, without what Python and the launches cost. What is needed
at least is counted, not measured: every input read once and every output written once (with
backward three times that), one exponential per state, channel, token and direction (with backward
two, as states are computed again). The GPU's limits stand in the head of the table: the bandwidth
of a copy measured here, and 16 exponentials per multiprocessor and clock at the highest clock.

A candidate that fails is a row that says why. ``--json`` is written after every row.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch
from gpu_candidates import THEIRS, Work, both, mixer_work, our_scans, scan_tensors, scan_work
from gpu_timing import (
    GpuLost,
    Record,
    Timing,
    describe_machine,
    gpu_limits,
    median_per_call,
    noting,
    take_turns,
)

from mmvim_ops.backends.cuda import plan as cuda_plan
from mmvim_ops.backends.cuda.cut import Cut, Sizes, chunk_counts, lanes_for


@dataclass
class Row(Timing):
    """A timing, of what, and what it would take at least. Ratios are to mamba_ssm in the same run,
    eager to eager and replayed to replayed."""

    work: str = 'scan'
    dtype: str = ''
    dim: int = 0
    length: int = 0
    backward: bool = False
    bytes: int | None = None
    exponentials: int | None = None
    ratio: float | None = None
    ratio_replayed: float | None = None


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--batch', type=int, default=8, help='%(default)s')
    add('--dims', type=int, nargs='+', default=[384, 768], metavar='D', help='%(default)s')
    add('--lengths', type=int, nargs='+', default=[1024, 4096], metavar='L', help='%(default)s')
    add('--dtypes', nargs='+', default=['bfloat16', 'float32'], help='%(default)s')
    add('--states', type=int, default=16, help='%(default)s')
    add('--backends', nargs='+', help='all that run on the GPU if not given')
    add('--repeat', type=int, default=15, help='timed repetitions: %(default)s')
    add('--mixer', action='store_true', help='the whole block, not its scans')
    add('--recompute', nargs='+', default=['activations', 'none'], help='of --mixer: %(default)s')
    add('--sweep', action='store_true', help='cuts of backend cuda, not candidates')
    add('--json', type=Path, help='file for the figures')
    return parser.parse_args()


def ratio(theirs: list[float | None], own: float | None) -> float | None:
    known = [time for time in theirs if time]
    return min(known) / own if known and own else None


def measure(args: argparse.Namespace, dim: int, length: int, dtype: str) -> Iterator[Row]:
    """Rows of one size, each as soon as it is known."""
    about = dict(work='mixer' if args.mixer else 'scan', dtype=dtype, dim=dim, length=length)
    failures: dict[str, str] = {}
    work: Work | None = None
    expected = None
    with noting(failures, 'inputs'):
        make = mixer_work if args.mixer else scan_work
        work = make(args, dim, length, getattr(torch, dtype))
    if work is None:
        yield Row('inputs', failure=failures['inputs'], **about)
        return
    with noting(failures, 'reference'):
        expected = work.expected()
    if expected is None:
        yield Row('reference', failure=failures['reference'], **about)
    for backward in (False, True):
        runs = {name: partial(work.run, name, backward) for name in work.functions}
        times: list[Timing] = []
        for timing in take_turns(runs, expected, args.repeat):
            times.append(timing)
            theirs = [t for t in times if t.name.startswith(THEIRS)]
            yield Row(
                **vars(timing),
                **about,
                backward=backward,
                bytes=work.bytes and work.bytes * (3 if backward else 1),
                exponentials=work.exponentials * (2 if backward else 1),
                ratio=ratio([t.time for t in theirs], timing.time),
                ratio_replayed=ratio([t.replayed for t in theirs], timing.replayed),
            )


@contextmanager
def cut_into(cut: Cut, backward: bool) -> Iterator[None]:
    """Have backend 'cuda' cut one pass in another way than it chooses.

    Its chunks are those of both passes, which have to have the same.
    """
    choose = cuda_plan.choose_cut

    def instead(sizes: Sizes, device: torch.device, which: bool) -> Cut:
        return (
            cut if which == backward else choose(sizes, device, which)._replace(chunks=cut.chunks)
        )

    with patch.object(cuda_plan, 'choose_cut', instead):
        yield


def sweep(args: argparse.Namespace, dim: int, length: int, dtype: str) -> Iterator[dict]:
    """Times of other cuts of a pass beside that of the backend's own choice."""
    inputs = scan_tensors(args.batch, dim, length, args.states, getattr(torch, dtype))
    grad = torch.randn_like(inputs[0])
    scan = partial(our_scans, 'cuda')

    def forward():
        with torch.no_grad():
            scan(*inputs)

    counts = [n for n in chunk_counts(length) if n in (1, 2, 4, 8, 16, 32)]
    sizes = Sizes(2, args.batch, 1, dim, length, args.states)
    for backward, run in ((False, forward), (True, partial(both, scan, inputs, grad))):
        times: dict[str, float] = {}
        failures: dict[str, str] = {}
        lanes = lanes_for(args.states, backward)
        cuts = [Cut(*each) for each in product(lanes, (1, 2, 4, 6), counts)]
        for cut in (None, *cuts):
            name = name_of(cut) if cut else 'as chosen'
            with noting(failures, name), cut_into(cut, backward) if cut else nullcontext():
                times[name] = median_per_call(run)
        about = dict(work='sweep', dtype=dtype, dim=dim, length=length, backward=backward)
        chosen = name_of(cuda_plan.choose_cut(sizes, inputs[0].device, backward))
        yield dict(**about, chosen=chosen, times=times, failures=failures)


def name_of(cut: Cut) -> str:
    return ' x '.join(map(str, cut))


def print_sweep(row: dict) -> None:
    times = dict(row['times'])
    chosen = times.pop('as chosen', None)
    print(
        f'{row["dtype"]} D {row["dim"]} L {row["length"]} {"f+b" if row["backward"] else "fwd"}: '
        f'{cell(chosen, 1e3, ".3f")} ms as chosen, {row["chosen"]}; lanes x warps x chunks:'
    )
    best = sorted(times, key=times.get)
    print('  ' + ', '.join(f'{cut} {1e3 * times[cut]:.3f}' for cut in best))
    for cut, reason in row['failures'].items():
        print(f'  {cut}: {reason}')
    sys.stdout.flush()


def cell(value: float | None, factor: float, form: str) -> str:
    return '–' if value is None else format(factor * value, form)


def share(amount: int | None, time: float | None, limit: float | None) -> float | None:
    """Of the limit per second that is reached, or with a limit of 1 how much per second."""
    return amount / time / limit if amount and time and limit else None


def print_row(r: Row, bandwidth: float | None, exponentials: float | None) -> None:
    fastest = min((t for t in (r.time, r.replayed) if t), default=None)
    cells = [
        f'{r.name:16}',
        f'{r.dtype:8}',
        f'{r.dim:4}',
        f'{r.length:5}',
        'f+b' if r.backward else 'fwd',
        f'{cell(r.time, 1e3, ".3f"):>8}',
        f'{cell(r.spread, 100, ".0f"):>4}',
        f'{cell(r.replayed, 1e3, ".3f"):>8}',
        f'{cell(r.ratio, 1, ".2f"):>5}',
        f'{cell(r.ratio_replayed, 1, ".2f"):>5}',
        f'{cell(share(r.bytes, fastest, 1), 1e-9, ".0f"):>6}',
        f'{cell(share(r.bytes, fastest, bandwidth), 100, ".0f"):>4}',
        f'{cell(share(r.exponentials, fastest, 1), 1e-9, ".0f"):>6}',
        f'{cell(share(r.exponentials, fastest, exponentials), 100, ".0f"):>4}',
        f'{cell(r.memory, 2**-20, ".0f"):>7}',
        f'{cell(r.error, 1, ".0e"):>7}',
        r.failure or '',
    ]
    print('|', ' | '.join(cells), '|', flush=True)


def print_head(args: argparse.Namespace, about: dict) -> None:
    print(*(f'{key}: {value}' for key, value in about.items()), sep='\n')
    print(
        f'batch {args.batch}, {args.states} states\n\n'
        '| candidate        | dtype    |    D |     L |     |  time/ms | ±/%  | replayed | '
        f'× {THEIRS} | replayed | GB/s | of limit/% | Gexp/s | of limit/% | MiB | error | note |\n'
        '|---|---|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|'
    )


def main() -> int:
    args = parse_args()
    if not torch.cuda.is_available():
        raise SystemExit('there is no CUDA device')
    about, limits = describe_machine(), (None, None)
    if not args.sweep:
        limits = gpu_limits()
        about['limit: GB/s of a copy'] = cell(limits[0], 1e-9, '.0f')
        about['limit: Gexp/s'] = cell(limits[1], 1e-9, '.0f')
        print_head(args, about)
    record, failed = Record(args.json, about), False
    for dtype, dim, length in product(args.dtypes, args.dims, args.lengths):
        try:
            for row in (sweep if args.sweep else measure)(args, dim, length, dtype):
                record.add(row)
                if isinstance(row, dict):
                    print_sweep(row)
                    failed |= 'as chosen' in row['failures']
                else:
                    print_row(row, *limits)
                    failed |= row.failure is not None
        except GpuLost as error:
            lost = Row(error.name, failure=error.reason, dtype=dtype, dim=dim, length=length)
            record.add(lost)
            print_row(lost, *limits)
            print(f'the GPU is lost to this process; go on without {error.name} (--backends)')
            return 1
    return int(failed)


if __name__ == '__main__':
    sys.exit(main())
