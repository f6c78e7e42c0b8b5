"""On a GPU the operators are used as PyTorch's own: on any stream, captured, compiled, in threads.

Where two ways of one computation are compared, they must agree bit by bit.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from threading import Barrier

import pytest
import torch
from gpu_cases import (
    DEVICE,
    EMULATED,
    TOLERANCES,
    USUAL,
    assert_equal,
    cuda_only,
    each_backend,
    size,
    synchronize,
    to_device,
)
from sanitizer_cases import CASES, OnlyOurKernels
from scan_cases import TENSORS, make_arguments, map_tensors, relative_error, upstream

from mmvim_ops import Direction, bidirectional_selective_scan, causal_conv1d, selective_scan

ops = torch.ops.mmvim_ops
LENGTH = size(901, 19)


def block(u, delta, A, B, C, D, z, delta_bias, weight, backend):
    """Convolution, one scan and two at once; all results depend on all arguments."""
    u = causal_conv1d(u, weight, delta_bias, backend=backend)
    y, state = selective_scan(
        *(u, delta, A, B, C, D, z, delta_bias, True, True), reverse=True, backend=backend
    )
    direction = Direction(u, delta, A, B, C, D, delta_bias)
    out = bidirectional_selective_scan(
        direction, direction._replace(u=y), z, True, scale=0.5, backend=backend
    )
    return out, state


def block_arguments(seed=0, **fixed):
    """What :func:`block` takes, and gradients of what it returns."""
    arguments = make_arguments(**USUAL | dict(length=LENGTH, seed=seed) | fixed)
    tensors = [arguments[name] for name in TENSORS]
    u, A = arguments['u'], arguments['A']
    tensors.append(torch.randn(u.shape[1], 4))
    grads = upstream(u), upstream(A.new_empty(u.shape[0], *A.shape))
    return [x.requires_grad_() for x in to_device(tensors)], to_device(grads)


def results(leaves, grads, backend, function=block):
    """Outputs and gradients."""
    out = function(*leaves, backend)
    return [x.detach() for x in (*out, *torch.autograd.grad(out, leaves, grads))]


@each_backend
def test_five_runs_are_equal_bit_by_bit(backend):
    """Races would show, too."""
    shape = size(dict(batch=4, channels=384, length=1000), {})
    for dtype in (torch.bfloat16, torch.float32):
        given = block_arguments(**shape, dtype=dtype)
        expected = results(*given, backend)
        for _ in range(4):
            assert_equal(results(*given, backend), expected)


def on_another_stream():
    return nullcontext() if EMULATED else torch.cuda.stream(torch.cuda.Stream())


@each_backend
def test_another_stream_with_its_producer_on_it(backend):
    """A kernel on any other stream would read what was there before the producer is done."""
    leaves, grads = block_arguments()
    expected = results(leaves, grads, backend)
    given = [torch.full_like(x, float('nan')).requires_grad_() for x in leaves]
    synchronize()
    with on_another_stream():
        if not EMULATED:
            torch.cuda._sleep(100_000_000)  # cycles, some 50 ms
        with torch.no_grad():
            for x, value in zip(given, leaves, strict=True):
                x.copy_(value)
        actual = [2 * x for x in results(given, grads, backend)]
    synchronize()
    assert_equal(actual, [2 * x for x in expected])


def capture(function):
    """Record what ``function`` launches in a CUDA graph, which the emulation has not.

    Returns:
        tuple: What ``function`` returns, and a function that computes it again in place.
    """
    if EMULATED:
        outputs = function()

        def replay():
            for x, new in zip(outputs, function(), strict=True):
                x.copy_(new)

        return outputs, replay
    with on_another_stream():
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        for _ in range(2):
            function()
    synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return outputs, graph.replay


def overwrite(given, new):
    with torch.no_grad():
        for x, value in zip(given, new, strict=True):
            x.copy_(value)


@each_backend
def test_a_graph_of_inference_is_replayed_on_new_data(backend):
    leaves, _ = block_arguments()

    @torch.no_grad()
    def infer():
        return block(*leaves, backend)

    out, replay = capture(infer)
    for seed in (1, 2):
        new, _ = block_arguments(seed)
        overwrite(leaves, new)
        replay()
        synchronize()
        with torch.no_grad():
            assert_equal(out, block(*new, backend))


@each_backend
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_graph_of_training_is_replayed_on_new_data(backend, dtype):
    leaves, grads = block_arguments(dtype=dtype)
    out, replay = capture(lambda: results(leaves, grads, backend))
    for seed in (1, 2):
        new, new_grads = block_arguments(seed, dtype=dtype)
        overwrite([*leaves, *grads], [*new, *new_grads])
        replay()
        synchronize()
        assert_equal(out, results(new, new_grads, backend))


@each_backend
def test_autocast_changes_nothing(backend):
    given = block_arguments()
    expected = results(*given, backend)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(DEVICE, dtype=dtype):
            assert_equal(results(*given, backend), expected)


@each_backend
@pytest.mark.slow
def test_compiled_by_inductor_it_equals_eager(backend):
    torch._dynamo.reset()
    leaves, grads = block_arguments()
    compiled = torch.compile(block, fullgraph=True)
    expected = results(leaves, grads, backend)
    actual = results(leaves, grads, backend, compiled)
    for ours, theirs in zip(actual, expected, strict=True):
        assert relative_error(ours, theirs) < TOLERANCES[torch.float32]


OPCHECKED = {
    'usual': USUAL,
    'bfloat16': dict(USUAL, dtype=torch.bfloat16),
    'constant': dict(groups_B=None, groups_C=3),
    'least': dict(skip=False, gate=False, bias=False, softplus=False),
}


@cuda_only
@pytest.mark.parametrize('case', OPCHECKED)
def test_opcheck(backend, case):
    arguments = to_device(make_arguments(**OPCHECKED[case] | dict(length=size(150, 70))))
    tensors = [None if (x := arguments[name]) is None else x.requires_grad_() for name in TENSORS]
    torch.library.opcheck(ops.cuda_scan.default, (*tensors, True, False, True))
    *others, z, bias = tensors
    directions = (*others, bias, *others, bias, z)
    torch.library.opcheck(ops.cuda_bidirectional_scan.default, (*directions, True, 0.5, True))
    weight = torch.randn(tensors[0].shape[1], 4, device=DEVICE).requires_grad_()
    torch.library.opcheck(ops.cuda_conv1d.default, (tensors[0], weight, bias, True, True))
    with torch.no_grad():
        torch.library.opcheck(ops.cuda_scan.default, (*tensors, False, True, False))


@each_backend
def test_opcheck_of_the_usual_case(backend):
    leaves, _ = block_arguments()
    *tensors, weight = leaves
    scan, conv1d = (getattr(ops, f'{backend}_{name}').default for name in ('scan', 'conv1d'))
    torch.library.opcheck(scan, (*tensors, True, True, True))
    torch.library.opcheck(conv1d, (tensors[0], weight, tensors[-1], True, False))


@each_backend
def test_two_threads_at_once(backend):
    """They want different amounts of shared memory, each on a stream of its own."""
    if EMULATED and backend == 'triton':
        pytest.skip("Triton's interpreter serves one thread at a time")
    fixed = [dict(batch=1), dict(batch=1)]
    if backend == 'cuda':
        fixed[1] |= dict(states=size(64, 20), channels=40)
    given = [block_arguments(seed, **more) for seed, more in enumerate(fixed)]
    expected = [results(*case, backend) for case in given]
    synchronize()
    start = Barrier(2)

    def work(index):
        start.wait()
        with on_another_stream():
            found = [results(*given[index], backend) for _ in range(size(30, 2))]
        synchronize()
        return found

    with ThreadPoolExecutor(2) as pool:
        for found, wanted in zip(pool.map(work, range(2)), expected, strict=True):
            for run in found:
                assert_equal(run, wanted)


@each_backend
def test_the_last_channels_of_a_view_are_left_alone(backend):
    """Results go to memory of their own, so what surrounds the arguments stays as it is."""
    leaves, grads = block_arguments()
    around = map_tensors(lambda x: x.new_full((x.numel() + 128,), 7.0), leaves)
    given = [
        room[64:-64].as_strided(x.shape, x.stride(), 64).copy_(x.detach()).requires_grad_()
        for room, x in zip(around, leaves, strict=True)
    ]
    assert_equal(results(given, grads, backend), results(leaves, grads, backend))
    for room in around:
        assert torch.equal(room[:64], torch.full_like(room[:64], 7.0))
        assert torch.equal(room[-64:], torch.full_like(room[-64:], 7.0))


@cuda_only
@pytest.mark.parametrize('name', CASES)
def test_the_cases_for_the_sanitizer_are_right(backend, name):
    CASES[name](DEVICE)


@cuda_only
def test_what_torch_computes_in_a_case_for_the_sanitizer_is_found(backend):
    """initcheck would take it for memory that nobody has written."""
    given = to_device(make_arguments())
    u, A = given.pop('u').requires_grad_(), given.pop('A')
    half = A.bfloat16()
    with OnlyOurKernels():
        A.to('meta')  # copies between devices are no computation
        out = selective_scan(u, A=A, **given, backend=backend)
        torch.autograd.grad(out, u, out.detach())
        with pytest.raises(AssertionError, match='torch would compute _to_copy'):
            selective_scan(u, A=half, **given, backend=backend)  # inside of our operator
        out = selective_scan(u, A=A, **given | {'delta': u}, backend=backend)
        with pytest.raises(AssertionError, match='torch would compute add'):
            torch.autograd.grad(out, u, out.detach())
