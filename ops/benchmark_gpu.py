"""Both directions of a Vim block's scan on a GPU: every backend, beside mamba_ssm's kernel.

    ops/measure_gpu.sh                     # on a bare machine: builds, checks, then runs this
    python ops/benchmark_gpu.py            # this alone
    python ops/benchmark_gpu.py --sweep    # backend 'cuda', cut in other ways than it chooses

Each candidate computes (y_forward + y_backward) · silu(z) / 2 from the same numbers, forward and
forward + backward. The backends get (batch, length, channels) in memory, as the block has it;
mamba_ssm gets (batch, channels, length), as its kernel wants it, and runs two scans, the second on
flipped copies whose output is flipped back. Either mamba_ssm or its compiled module
``selective_scan_cuda`` (ops/build_mamba_ssm.py) has to be importable for that.

Times are per call, from calls that follow each other without a pause; all candidates take turns.
"replayed" is the same from a CUDA graph, without what Python and the launches cost. What is needed
at least is counted, not measured: every input read once and every output written once (with
backward three times that), one exponential per state, channel, token and direction (with backward
two, as states are computed again). The GPU's limits stand in the head of the table: the bandwidth
of a copy measured here, and 16 exponentials per multiprocessor and clock at the highest clock.
"""

import argparse
import json
import statistics
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch

from mmvim_ops import Direction, available_backends, bidirectional_selective_scan
from mmvim_ops.backends import BACKENDS
from mmvim_ops.backends.cuda import plan as cuda_plan

EXPONENTIALS_PER_CLOCK = 16  # of a multiprocessor: compute capability 7.0 to 9.0
THEIRS = 'mamba_ssm'


@dataclass
class Result:
    """One candidate at one size. Times in seconds, shares of the GPU's limits, memory in bytes."""

    name: str
    dtype: str
    dim: int
    length: int
    backward: bool
    time: float
    spread: float
    replayed: float | None
    memory: int
    bytes: int
    exponentials: int
    error: float
    ratio: float | None = None


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
    add('--sweep', action='store_true', help='chunks and warps of backend cuda, not candidates')
    add('--json', type=Path, help='file for the figures')
    return parser.parse_args()


# The candidates: functions of (u, delta, A, B, C, D, bias) of both directions and z.


def ours(backend: str, *tensors: torch.Tensor) -> torch.Tensor:
    forward, backward = Direction(*tensors[:7]), Direction(*tensors[7:14])
    return bidirectional_selective_scan(
        forward, backward, tensors[14], True, scale=0.5, backend=backend
    )


def two_scans(scan: Callable, *tensors: torch.Tensor) -> torch.Tensor:
    z = tensors[14]
    out = scan(*tensors[:6], z, tensors[6], True)
    u, delta, A, B, C, D, bias = tensors[7:14]
    u, delta, B, C, z = (x.flip(-1) for x in (u, delta, B, C, z))
    return (out + scan(u, delta, A, B, C, D, z, bias, True).flip(-1)) * 0.5


class CompiledScan(torch.autograd.Function):
    """mamba_ssm's compiled module without its Python package."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, bias, softplus):
        import selective_scan_cuda

        B, C = B.unsqueeze(1), C.unsqueeze(1)  # (B, 1, N, L)
        y, states, out = selective_scan_cuda.fwd(u, delta, A, B, C, D, z, bias, softplus)
        ctx.save_for_backward(u, delta, A, B, C, D, z, bias, states, y)
        ctx.softplus = softplus
        return out

    @staticmethod
    def backward(ctx, grad):
        import selective_scan_cuda

        *tensors, states, y = ctx.saved_tensors
        grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias, grad_z = (
            selective_scan_cuda.bwd(
                *tensors, grad.contiguous(), states, y, None, ctx.softplus, False
            )
        )
        grad_B, grad_C = grad_B.squeeze(1), grad_C.squeeze(1)
        return grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, None


def find_theirs() -> Callable | None:
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        pass
    else:
        return selective_scan_fn
    try:
        import selective_scan_cuda  # noqa: F401
    except ImportError:
        print('neither mamba_ssm nor selective_scan_cuda can be imported: left out')
        return None
    return CompiledScan.apply


def make_inputs(args: argparse.Namespace, dim: int, length: int, dtype: torch.dtype) -> list:
    """Fifteen tensors with channels next to each other, values as in the model."""
    torch.manual_seed(0)
    make = partial(torch.randn, device='cuda')

    def sequence(width: int) -> torch.Tensor:
        return make(args.batch, length, width).to(dtype).transpose(1, 2)

    def direction() -> list:
        A = -torch.arange(1.0, args.states + 1, device='cuda').repeat(dim, 1)
        bias = torch.empty(dim, device='cuda').uniform_(-6.9, -2.25)  # steps of 1e-3 … 1e-1
        matrices = (sequence(args.states) for _ in range(2))
        return [sequence(dim), 0.1 * sequence(dim), A, *matrices, torch.ones_like(bias), bias]

    tensors = [*direction(), *direction(), sequence(dim)]
    return [x.detach().requires_grad_() for x in tensors]


# Measuring.


def per_call(run: Callable[[], object], calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def capture(run: Callable[[], object]) -> Callable[[], None] | None:
    """The same work as a CUDA graph; None where it cannot be captured."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    try:
        with torch.cuda.stream(stream):
            run()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        print(f'not captured: {str(error).splitlines()[0]}')
        torch.cuda.synchronize()
        return None
    return graph.replay


def peak_memory(run: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def gpu_limits() -> tuple[float, float]:
    """Bytes and exponentials per second."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device='cuda')
    target = torch.empty_like(source)
    copy = partial(target.copy_, source)
    copy()
    bandwidth = 2 * source.numel() / min(per_call(copy, 10) for _ in range(5))
    query = ['nvidia-smi', '--query-gpu=clocks.max.sm', '--format=csv,noheader,nounits']
    clock = float(subprocess.run(query, capture_output=True, text=True).stdout.split()[0]) * 1e6
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    return bandwidth, EXPONENTIALS_PER_CLOCK * processors * clock


def relative_error(actual: list, expected: list) -> float:
    """The largest of ‖actual − expected‖ / ‖expected‖."""
    return max(
        ((a.float() - e.float()).norm() / e.float().norm().clamp_min(1e-12)).item()
        for a, e in zip(actual, expected, strict=True)
    )


def measure(args: argparse.Namespace, dim: int, length: int, dtype: str) -> list[Result]:
    inputs = make_inputs(args, dim, length, getattr(torch, dtype))
    theirs = [x.detach().contiguous().requires_grad_() for x in inputs]  # time in front
    grad = torch.randn_like(inputs[0])
    names = args.backends or [n for n in available_backends() if BACKENDS[n].runs_on('cuda')]
    work = {name: (partial(ours, name), inputs, grad) for name in names}
    scan = find_theirs()
    if scan is not None:
        work[THEIRS] = (partial(two_scans, scan), theirs, grad.contiguous())

    def forward(function, tensors, _):
        with torch.no_grad():
            return [function(*tensors)]

    def both(function, tensors, grad):
        out = function(*tensors)
        return [out, *torch.autograd.grad(out, tensors, grad)]

    exact = [x.detach().float().requires_grad_() for x in inputs]
    exact = both(partial(ours, 'torch'), exact, grad.float())
    once = sum(x.nbytes for x in inputs) + grad.nbytes
    exponentials = 2 * args.batch * dim * length * args.states
    results = []
    for backward, kind in ((False, forward), (True, both)):
        runs = {name: partial(kind, *arguments) for name, arguments in work.items()}
        errors = {name: relative_error(run(), exact[: len(run())]) for name, run in runs.items()}
        calls = {name: max(1, int(0.02 / per_call(run, 2))) for name, run in runs.items()}
        times = {name: [] for name in runs}
        for _ in range(args.repeat):
            for name, run in runs.items():
                times[name].append(per_call(run, calls[name]))
        medians = {name: statistics.median(values) for name, values in times.items()}
        for name, run in runs.items():
            replay = capture(run)
            replayed = None
            if replay is not None:
                replay()
                replayed = statistics.median(per_call(replay, calls[name]) for _ in range(5))
            result = Result(
                *(name, dtype, dim, length, backward, medians[name]),
                spread=(max(times[name]) - min(times[name])) / medians[name],
                replayed=replayed,
                memory=peak_memory(run),
                bytes=once * (3 if backward else 1),
                exponentials=exponentials * (2 if backward else 1),
                error=errors[name],
            )
            if THEIRS in medians:
                result.ratio = medians[THEIRS] / medians[name]
            results.append(result)
    return results


@contextmanager
def cut_into(chunks: int, warps: int) -> Iterator[None]:
    """Have backend 'cuda' cut every length into so many chunks and take blocks of so many warps."""
    with (
        patch.object(cuda_plan, 'count_chunks', lambda *_: chunks),
        patch.object(cuda_plan.Plan, 'warps', lambda *_: warps),
    ):
        yield


def sweep(args: argparse.Namespace, dim: int, length: int, dtype: str) -> None:
    """Print times of other numbers of chunks and warps beside those of the backend's own choice."""
    inputs = make_inputs(args, dim, length, getattr(torch, dtype))
    grad = torch.randn_like(inputs[0])
    scan = partial(ours, 'cuda', *inputs)

    def forward():
        with torch.no_grad():
            scan()

    def both():
        torch.autograd.grad(scan(), inputs, grad)

    most = length // cuda_plan.constant('segment')
    cuts = [(n, w) for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32) if n <= most for w in (1, 2)]
    for name, run in (('fwd', forward), ('f+b', both)):
        times = {}
        for cut in (None, *cuts):
            with cut_into(*cut) if cut else nullcontext():
                calls = max(1, int(0.02 / per_call(run, 2)))
                times[cut] = 1e3 * statistics.median(per_call(run, calls) for _ in range(5))
        chosen = times.pop(None)
        print(f'{dtype} D {dim} L {length} {name}: {chosen:.3f} ms as chosen; chunks x warps:')
        best = sorted(times, key=times.get)
        print('  ' + ', '.join(f'{n} x {w} {times[n, w]:.3f}' for n, w in best), flush=True)


def print_row(r: Result, bandwidth: float, exponentials: float) -> None:
    fastest = min(r.time, r.replayed or r.time)
    cells = [
        f'{r.name:9}',
        f'{r.dtype:8}',
        f'{r.dim:4}',
        f'{r.length:5}',
        'f+b' if r.backward else 'fwd',
        f'{1e3 * r.time:8.3f}',
        f'{100 * r.spread:4.0f}',
        f'{1e3 * r.replayed:8.3f}' if r.replayed else '       –',
        f'{r.ratio:5.2f}' if r.ratio else '    –',
        f'{r.bytes / fastest / 1e9:6.0f}',
        f'{100 * r.bytes / fastest / bandwidth:4.0f}',
        f'{r.exponentials / fastest / 1e9:6.0f}',
        f'{100 * r.exponentials / fastest / exponentials:4.0f}',
        f'{r.memory / 2**20:7.0f}',
        f'{r.error:7.0e}',
    ]
    print('|', ' | '.join(cells), '|', flush=True)


def main() -> None:
    args = parse_args()
    if not torch.cuda.is_available():
        raise SystemExit('there is no CUDA device')
    sizes = list(product(args.dtypes, args.dims, args.lengths))
    if args.sweep:
        for dtype, dim, length in sizes:
            sweep(args, dim, length, dtype)
        return
    bandwidth, exponentials = gpu_limits()
    print(
        f'{torch.cuda.get_device_name()}, torch {torch.__version__}, batch {args.batch}, '
        f'{args.states} states; limits: {bandwidth / 1e9:.0f} GB/s (a copy, measured), '
        f'{exponentials / 1e9:.0f} Gexp/s (16 per multiprocessor and clock)'
    )
    print(
        '| scan      | dtype    |    D |     L |     |  time/ms | ±/%  | replayed | × '
        f'{THEIRS} | GB/s | of limit/% | Gexp/s | of limit/% | MiB | error |\n'
        '|---|---|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|'
    )
    results = []
    for dtype, dim, length in sizes:
        rows = measure(args, dim, length, dtype)
        results += rows
        for row in rows:
            print_row(row, bandwidth, exponentials)
        if args.json:
            args.json.write_text(json.dumps([asdict(r) for r in results], indent=1))


if __name__ == '__main__':
    main()
