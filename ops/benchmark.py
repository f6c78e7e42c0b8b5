"""Time and memory of the selective scan: every backend that runs here, in one run.

    python ops/benchmark.py                              # the table of docs/ops.md
    python ops/benchmark.py --lengths 4096 --dims 384    # one size
    python ops/benchmark.py --device cuda --dtypes float32 bfloat16 --batch 8

Beside the backends stand the sequential reference (one step of the recurrence per token, in plain
PyTorch) and, where it is installed, mamba_ssm's CUDA kernel. Ratios to the reference are of the
same run, on the same inputs. Repetitions of all candidates take turns, so that a machine which
slows down slows all of them down. Both directions of a block on a GPU: ops/benchmark_gpu.py.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from mmvim_ops import available_backends, selective_scan
from mmvim_ops.backends import BACKENDS

REFERENCE = 'sequential'


@dataclass
class Result:
    """One candidate at one size. Times in seconds, memory in bytes.

    ``bandwidth`` counts every input read once and every output written once; ``updates`` counts
    one per state, channel, token and direction of differentiation.
    """

    name: str
    dtype: str
    dim: int
    length: int
    backward: bool
    time: float
    spread: float
    memory: int
    bandwidth: float
    updates: float
    speedup: float | None = None


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    add = parser.add_argument
    lengths = [256, 512, 1024, 2048, 4096, 8192, 16384]
    add('--lengths', type=int, nargs='+', default=lengths, metavar='L', help='%(default)s')
    add('--dims', type=int, nargs='+', default=[384, 768], metavar='D', help='%(default)s')
    add('--dtypes', nargs='+', default=['float32'], help='of u, delta, B, C and z: %(default)s')
    add('--batch', type=int, default=1, help='%(default)s')
    add('--states', type=int, default=16, help='%(default)s')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='%(default)s')
    add('--threads', type=int, default=torch.get_num_threads(), help='on the CPU: %(default)s')
    add('--repeat', type=int, default=7, help='timed repetitions: %(default)s')
    add('--backends', nargs='+', help='all that run on the device if not given')
    add('--reference-up-to', type=int, default=4096, help='longest L of the slow reference')
    add('--json', type=Path, help='file for the figures')
    add('--plot', type=Path, help='PNG file for time over length (needs matplotlib)')
    return parser.parse_args()


def sequential(u, delta, A, B, C, D, z, delta_bias, delta_softplus=True) -> torch.Tensor:
    """The recurrence as written: decay and input of all tokens first, then a step per token."""
    delta = F.softplus(delta.float() + delta_bias[:, None])  # (B, D, L)
    decay = torch.exp(torch.einsum('bdl,dn->bdln', delta, A))  # (B, D, L, N)
    drive = torch.einsum('bdl,bnl,bdl->bdln', delta, B.float(), u.float())  # (B, D, L, N)
    h, states = torch.zeros_like(decay[:, :, 0]), []  # (B, D, N)
    for decay_t, drive_t in zip(decay.unbind(2), drive.unbind(2), strict=True):
        h = decay_t * h + drive_t
        states.append(h)
    y = torch.einsum('bdln,bnl->bdl', torch.stack(states, dim=2), C.float())
    return ((y + D[:, None] * u.float()) * F.silu(z.float())).to(u.dtype)


def candidates(args: argparse.Namespace) -> dict[str, Callable]:
    """Name -> function of the scan's first eight arguments."""
    device_type = torch.device(args.device).type
    names = args.backends or [n for n in available_backends() if BACKENDS[n].runs_on(device_type)]
    found = {n: partial(selective_scan, delta_softplus=True, backend=n) for n in names}
    if device_type == 'cuda':
        try:
            from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
        except ImportError:
            print('mamba_ssm is not installed: left out')
        else:
            found['mamba_ssm'] = partial(selective_scan_fn, delta_softplus=True)
    found[REFERENCE] = sequential
    return found


def make_inputs(args: argparse.Namespace, dim: int, length: int, dtype: torch.dtype) -> list:
    """Inputs as the Vim block makes them: (B, L, D) in memory, seen as (B, D, L)."""
    torch.manual_seed(0)
    make = partial(torch.randn, device=args.device)

    def sequence(width: int) -> torch.Tensor:
        return make(args.batch, length, width).to(dtype).transpose(1, 2)

    A = -torch.arange(1.0, args.states + 1, device=args.device).repeat(dim, 1)
    u, delta, z = (sequence(dim) for _ in range(3))
    B, C = sequence(args.states), sequence(args.states)
    # softplus of the bias spreads over 1e-3 … 1e-1, as initialised in the model
    bias = torch.empty(dim, device=args.device).uniform_(-6.9, -2.25)
    inputs = [u, 0.1 * delta, A, B, C, torch.ones(dim, device=args.device), z, bias]
    return [x.detach().requires_grad_() for x in inputs]


def synchronize(device: str) -> None:
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize()


def timed(run: Callable[[], object], device: str) -> float:
    run()  # brings code and data back that the other candidates pushed out of the caches
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def peak_memory(run: Callable[[], object], device: str) -> int:
    """Largest number of bytes allocated at a time while running."""
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profiler:
        run()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == '[memory]':
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def measure(args: argparse.Namespace, dim: int, length: int, dtype: str) -> list[Result]:
    inputs = make_inputs(args, dim, length, getattr(torch, dtype))
    grad = torch.randn_like(inputs[0])
    once = sum(x.nbytes for x in inputs) + grad.nbytes

    def forward(scan: Callable) -> None:
        with torch.no_grad():
            scan(*inputs)

    def both(scan: Callable) -> None:
        torch.autograd.grad(scan(*inputs), inputs, grad)

    scans = candidates(args)
    if length > args.reference_up_to:
        del scans[REFERENCE]
    results = []
    for backward, run in ((False, forward), (True, both)):
        times = {name: [] for name in scans}
        for _ in range(args.repeat):
            for name, scan in scans.items():
                times[name].append(timed(partial(run, scan), args.device))
        moved = once * (3 if backward else 1)  # backward reads them again and writes gradients
        updates = args.batch * dim * length * args.states * (2 if backward else 1)
        for name, scan in scans.items():
            seconds = statistics.median(times[name])
            result = Result(name, dtype, dim, length, backward, seconds, 0.0, 0, 0.0, 0.0)
            result.spread = (max(times[name]) - min(times[name])) / seconds
            result.memory = peak_memory(partial(run, scan), args.device)
            result.bandwidth, result.updates = moved / seconds, updates / seconds
            if REFERENCE in scans:
                result.speedup = statistics.median(times[REFERENCE]) / seconds
            results.append(result)
    return results


def print_row(r: Result, output_bytes: int) -> None:
    cells = [
        f'{r.name:10}',
        f'{r.dtype:8}',
        f'{r.dim:4}',
        f'{r.length:5}',
        'f+b' if r.backward else 'fwd',
        f'{1e3 * r.time:9.2f}',
        f'{100 * r.spread:4.0f}',
        f'{r.memory / output_bytes:7.2f}',
        f'{r.bandwidth / 1e9:7.2f}',
        f'{r.updates / 1e9:6.2f}',
        f'{r.speedup:7.1f}' if r.speedup else '      –',
    ]
    print('|', ' | '.join(cells), '|', flush=True)


def plot(results: list[Result], path: Path) -> None:
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    dims = sorted({r.dim for r in results})
    figure, axes = pyplot.subplots(2, len(dims), figsize=(5 * len(dims), 8), squeeze=False)
    for row, backward in zip(axes, (False, True), strict=True):
        for axis, dim in zip(row, dims, strict=True):
            for series in sorted({(r.name, r.dtype) for r in results}):
                points = [
                    (r.length, 1e3 * r.time)
                    for r in results
                    if (r.name, r.dtype, r.dim, r.backward) == (*series, dim, backward)
                ]
                axis.plot(*zip(*points, strict=True), marker='o', label=', '.join(series))
            title = f'D = {dim}, forward{" + backward" if backward else ""}'
            axis.set(xscale='log', yscale='log', xlabel='L', ylabel='ms', title=title)
            axis.set_xscale('log', base=2)
            axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    cuda = torch.device(args.device).type == 'cuda'
    machine = torch.cuda.get_device_name() if cuda else f'CPU, {args.threads} threads'
    print(f'{machine}, {platform.machine()}, torch {torch.__version__}, batch {args.batch}')
    print(
        '| scan       | dtype    |    D |     L |     |   time/ms | ±/%  | mem/out |    GB/s '
        '| Gupd/s | × ref   |\n|---|---|---:|---:|---|---:|---:|---:|---:|---:|---:|'
    )
    results = []
    for dtype in args.dtypes:
        for dim in args.dims:
            for length in args.lengths:
                rows = measure(args, dim, length, dtype)
                results += rows
                output = args.batch * dim * length * getattr(torch, dtype).itemsize
                for row in rows:
                    print_row(row, output)
    if args.json:
        args.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    if args.plot:
        plot(results, args.plot)
        print(f'plot: {args.plot}')


if __name__ == '__main__':
    main()
