"""Backends that are not proven yet on a kind of device check themselves there, once per process.

Before such a backend first computes on a device in a dtype, it computes a small example of every
operation with all gradients, which is compared with backend ``torch`` in float64 on the CPU. One
that is wrong is not used there: ``backend=None`` takes the next one with a warning, and by name it
is refused. ``MMVIM_OPS_SELF_CHECK=0`` in the environment switches this off. It is read once, when
mmvim_ops is imported.

A thread of its own runs the check. What torch keeps per thread is at its defaults there (autograd
and inference mode, autocast, modes that watch or change operations, the backend selected), and
stays as it is in the thread that called.
"""

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from ..calls import (
    BidirectionalCall,
    Call,
    Conv1dCall,
    Direction,
    MixerCall,
    MixerDirection,
    ScanCall,
)
from ..environment import is_on
from ..naive import causal_conv1d_naive, compute_dtype, mamba_mixer_naive, selective_scan_naive
from .backend import Backend
from .torch import TorchBackend

SWITCH = 'MMVIM_OPS_SELF_CHECK'
ENABLED = is_on(SWITCH)

# Of a result's largest element. Right kernels reach 1e-6 in float32, 1e-3 in float16, 8e-3 in
# bfloat16 (tests/ops/backends/test_self_check.py).
TOLERANCES = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 3e-2,
}
# On a GPU two chunks of unequal length, a warp's channels and a part of another's.
BATCH, CHANNELS, STATES, LENGTH, TAPS = 2, 24, 16, 300, 4
TOKENS, RANK = 20, 2  # of the mixer, whose reference takes its time
# In float32 beside half precision.
PARAMETERS = ('A', 'D', 'delta_bias', 'weight', 'bias', 'conv_weight', 'conv_bias', 'dt_bias')

_lock = threading.Lock()
_verdicts: dict[tuple[str, torch.device, torch.dtype], str | None] = {}  # None: it is right
_failed: dict[str, str] = {}  # by name, for what is compiled: the last verdict that is not None


def why_not(
    backend: Backend, device: torch.device | str, dtype: torch.dtype, call: Call | None
) -> str | None:
    """Why a backend is not to be used on a device; None where it is right or need not be checked.

    The first call that can check does so, and others that come meanwhile wait for it. What is being
    traced or captured is not checked; what is compiled does without a backend that has failed
    anywhere.

    Args:
        backend (Backend): It runs on the device, in this dtype.
        device (torch.device | str): Of the input; a string is not checked.
        dtype (torch.dtype): Of the input.
        call (Call | None): What is to be computed. None asks before there is a call.
    """
    if isinstance(device, str) or device.type not in backend.checks_itself_on or not ENABLED:
        return None
    if torch.compiler.is_compiling():
        return _failed.get(backend.name)
    key = backend.name, device, dtype
    try:
        return _verdicts[key]
    except KeyError:
        return _check(key, backend, call)


def _check(key: tuple[str, torch.device, torch.dtype], backend: Backend, call) -> str | None:
    """The verdict, where one is possible now."""
    name, device, dtype = key
    if not _can_check(device, call):
        return None
    # The check does not come back here: it calls backends, which call no other.
    with _lock:
        if key not in _verdicts:
            try:
                verdict = _in_new_thread(device, partial(_judge, backend, device, dtype))
            except torch.cuda.OutOfMemoryError:
                return None  # it says nothing about the backend; the next call checks
            if verdict is not None:
                _failed[name] = verdict
            _verdicts[key] = verdict
    return _verdicts[key]


def _can_check(device: torch.device, call: Call | None) -> bool:
    """Whether the calling thread computes, and nothing waits for it that the check needs."""
    if torch.jit.is_tracing() or detect_fake_mode(call) is not None:
        return False
    if torch._C._current_graph_task_id() != -1:
        return False  # inside of a backward pass, on the thread that has to run the check's
    return not _is_capturing(device)


def _is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being made of what is called."""
    if device.type != 'cuda':
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _in_new_thread(device: torch.device, function: Callable[[], str | None]) -> str | None:
    stream = torch.cuda.current_stream(device) if device.type == 'cuda' else None

    def run():
        with torch.cuda.stream(stream):  # a thread begins with the first device's default stream
            return function()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def _judge(backend: Backend, device: torch.device, dtype: torch.dtype) -> str | None:
    wrong = what_is_wrong(differences(backend, device, dtype, TorchBackend))
    if not wrong:
        return None
    card = f'{torch.cuda.get_device_name(device)}, ' if device.type == 'cuda' else ''
    return (
        f'failed its check on {card}{device}, in {dtype}: {wrong}. Please report this with what '
        f'`python -m mmvim_ops` prints ({SWITCH}=0 switches the check off)'
    )


class Composed(Exception):
    """The backend has no kernel of its own for an example."""


class Difference(NamedTuple):
    """How far one result of a backend is from that of the reference."""

    operation: str
    result: str
    error: float  # the largest difference over the largest element; inf where it raised
    tolerance: float
    raised: str = ''

    def is_wrong(self) -> bool:
        return not self.error <= self.tolerance  # NaN is wrong


def largest_error(found: list[Difference]) -> float:
    """NaN where there is one."""
    return max((difference.error for difference in found), key=lambda x: (math.isnan(x), x))


def what_is_wrong(found: list[Difference]) -> str:
    """Which results of which operations; '' where all are right."""
    operations = []
    for operation, differences in groupby(found, lambda difference: difference.operation):
        every = list(differences)
        wrong = [difference for difference in every if difference.is_wrong()]
        if not wrong:
            continue
        if wrong[0].raised:
            operations.append(f'{operation} raised {wrong[0].raised}')
            continue
        names = ', '.join(difference.result for difference in wrong)
        if len(wrong) == len(every):
            names = 'every result and gradient'
        error = f'relative error {largest_error(wrong):.0e}, allowed {wrong[0].tolerance:.0e}'
        operations.append(f'{operation}: {names} ({error})')
    return '; '.join(operations)


class Specification(Backend):
    """``naive.py`` as a reference: independent of every backend, and slow."""

    def scan(self, call: ScanCall) -> tuple[Tensor, Tensor]:
        return selective_scan_naive(
            **call.direction._asdict(),
            z=call.z,
            delta_softplus=call.delta_softplus,
            return_last_state=True,
            reverse=call.reverse,
        )

    def conv1d(self, call: Conv1dCall) -> Tensor:
        x, weight, bias, _, reverse = call
        return causal_conv1d_naive(x, weight, bias, reverse=reverse)


def differences(
    backend: Backend,
    device: torch.device | str,
    dtype: torch.dtype,
    reference: Callable[[], Backend],
) -> list[Difference]:
    """Every result and gradient of every operation, compared with those of ``reference`` in float64
    on the CPU."""
    found = []
    for number, example in enumerate(_examples()):
        tolerance = allowed(example, torch.device(device), dtype)
        try:
            actual = _results(example, backend, device, dtype)
        except Composed:
            continue
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as problem:  # whatever it is, the other operations are still compared
            raised = f'{type(problem).__name__}: {problem}'
            found.append(Difference(example.operation, '', math.inf, tolerance, raised))
            continue
        for name, expected in _expected(reference, number).items():
            error = (actual[name] - expected).abs().max() / expected.abs().max()
            found.append(Difference(example.operation, name, error.item(), tolerance))
    return found


@lru_cache
def _expected(reference: Callable[[], Backend], number: int) -> dict[str, Tensor]:
    """What a reference says about an example; every backend, device and dtype is compared with it.

    It is asked after the backend: the first backward pass of a process starts threads for GPUs,
    which keep the number of CPU threads that they find.
    """
    with _one_thread():
        return _results(_examples()[number], reference(), 'cpu', torch.float64)


@contextmanager
def _one_thread():
    """Where torch computes by several, each of thousands of small operations waits until all of
    them get a core: beside other work, that is 20 s instead of one. A thread whose first
    computation comes meanwhile keeps the one; torch has no setting for a thread alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Example(NamedTuple):
    """One operation on random numbers: float64, but numbers of bfloat16, exact in every dtype."""

    operation: str
    run: Callable[[Backend, dict[str, Tensor]], dict[str, Tensor]]  # results by name
    inputs: dict[str, Tensor]
    weights: dict[str, Tensor]  # of the results, in the sum whose gradients are compared
    products: bool = False  # matrix products are between its steps


def allowed(example: Example, device: torch.device, dtype: torch.dtype) -> float:
    """The largest difference of a result, in units of its largest element.

    Between matrix products, numbers are rounded to half precision several times. On a GPU users may
    have float32 products computed in TensorFloat-32, which rounds their factors as float16 does.
    """
    if not example.products:
        return TOLERANCES[dtype]
    if device.type == 'cuda' and dtype == torch.float32:
        return TOLERANCES[torch.float16]
    return 4 * TOLERANCES[dtype]


@lru_cache(maxsize=1)
def _examples() -> tuple[Example, ...]:
    generator = torch.Generator().manual_seed(0)  # nobody else's random numbers change

    def random(*shape: int) -> Tensor:
        numbers = torch.randn(shape, generator=generator, dtype=torch.float64, device='cpu')
        return numbers.bfloat16().double()

    def sequence(mixer: bool, rows: int = CHANNELS) -> Tensor:
        """(B, rows, L), rows next to each other in memory as in a mixer, or time steps."""
        if mixer:
            return random(BATCH, LENGTH, rows).transpose(1, 2)
        return random(BATCH, rows, LENGTH)

    def direction(mixer: bool) -> dict[str, Tensor]:
        return {
            'u': sequence(mixer),
            'delta': sequence(mixer),
            'A': -random(CHANNELS, STATES).abs(),
            'B': sequence(mixer, STATES),
            'C': sequence(mixer, STATES),
            'D': random(CHANNELS),
            'delta_bias': random(CHANNELS),
        }

    def scan(reverse: bool) -> Example:
        return Example(
            'the scan from the end' if reverse else 'the scan',
            partial(_scan, reverse),
            {**direction(mixer=reverse), 'z': sequence(mixer=reverse)},
            {'output': sequence(reverse), 'last state': random(BATCH, CHANNELS, STATES)},
        )

    def convolution(reverse: bool) -> Example:
        return Example(
            'the convolution from the end' if reverse else 'the convolution',
            partial(_conv1d, reverse),
            {'x': sequence(reverse), 'weight': random(CHANNELS, TAPS), 'bias': random(CHANNELS)},
            {'output': sequence(reverse)},
        )

    both = {
        f'{which} {name}': x
        for which in ('forward', 'backward')
        for name, x in direction(mixer=True).items()
    }

    def weight(*shape: int) -> Tensor:
        """Products with it are about as large as what it is multiplied with."""
        return (random(*shape) / shape[-1] ** 0.5).bfloat16().double()

    mixer = {
        'tokens': random(BATCH, TOKENS, CHANNELS),
        'norm_weight': 1 + weight(CHANNELS),
        'in_weight': weight(4 * CHANNELS, CHANNELS),
        'out_weight': weight(CHANNELS, 2 * CHANNELS),
    }
    for which in ('forward', 'backward'):
        sizes = dict(
            conv_weight=(2 * CHANNELS, TAPS),
            conv_bias=(2 * CHANNELS,),
            x_proj_weight=(RANK + 2 * STATES, 2 * CHANNELS),
            dt_proj_weight=(2 * CHANNELS, RANK),
            dt_bias=(2 * CHANNELS,),
            A=(2 * CHANNELS, STATES),
            D=(2 * CHANNELS,),
        )
        mixer |= {f'{which} {name}': weight(*shape) for name, shape in sizes.items()}
        mixer[f'{which} A'] = -random(2 * CHANNELS, STATES).abs()

    return (
        scan(reverse=False),
        scan(reverse=True),
        Example(
            'the scan in both directions',
            _bidirectional_scan,
            {**both, 'z': sequence(mixer=True)},
            {'output': sequence(mixer=True)},
        ),
        convolution(reverse=False),
        convolution(reverse=True),
        Example(
            *('the mixer', _mixer, mixer, {'output': random(BATCH, TOKENS, CHANNELS)}),
            products=True,
        ),
    )


def _scan(reverse: bool, backend: Backend, given: dict[str, Tensor]) -> dict[str, Tensor]:
    direction = Direction(*(given[name] for name in Direction._fields))
    out, last_state = backend.scan(ScanCall(direction, given['z'], True, reverse))
    return {'output': out, 'last state': last_state}


def _bidirectional_scan(backend: Backend, given: dict[str, Tensor]) -> dict[str, Tensor]:
    forward, backward = (
        Direction(*(given[f'{which} {name}'] for name in Direction._fields))
        for which in ('forward', 'backward')
    )
    call = BidirectionalCall(forward, backward, given['z'], True, 0.5)
    return {'output': backend.bidirectional_scan(call)}


def _conv1d(reverse: bool, backend: Backend, given: dict[str, Tensor]) -> dict[str, Tensor]:
    call = Conv1dCall(given['x'], given['weight'], given['bias'], True, reverse)
    return {'output': backend.conv1d(call)}


def _mixer(backend: Backend, given: dict[str, Tensor]) -> dict[str, Tensor]:

    def direction(which: str) -> MixerDirection:
        conv, conv_bias, x_proj, dt_proj, dt_bias, A, D = (
            given[f'{which} {name}'] for name in MixerDirection._fields[:7]
        )
        reverse = which == 'backward'
        return MixerDirection(conv, conv_bias, x_proj, dt_proj, dt_bias, A, D, reverse)

    directions = direction('forward'), direction('backward')
    tokens, norm, into, out = (
        given[name] for name in ('tokens', 'norm_weight', 'in_weight', 'out_weight')
    )
    call = MixerCall(tokens, norm, into, None, out, None, directions, 0.5, 1e-5, 'activations')
    result = backend.mamba_mixer(call)
    if result is None:
        if not isinstance(backend, (TorchBackend, Specification)):
            raise Composed
        result = mamba_mixer_naive(tokens, into, directions, out, norm_weight=norm, scale=0.5)
    return {'output': result}


def _results(
    example: Example, backend: Backend, device: torch.device | str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Outputs and the gradients of all inputs, in float64 on the CPU."""

    def place(name: str, x: Tensor) -> Tensor:
        kind = compute_dtype(dtype) if name.split()[-1] in PARAMETERS else dtype
        return x.to(device, kind, copy=True).requires_grad_()

    given = {name: place(name, x) for name, x in example.inputs.items()}
    results = example.run(backend, given)
    weights = [example.weights[name].to(x) for name, x in results.items()]
    grads = torch.autograd.grad(list(results.values()), list(given.values()), weights)
    results |= {f'gradient of {name}': x for name, x in zip(given, grads, strict=True)}
    return {name: x.detach().to('cpu', torch.float64) for name, x in results.items()}
