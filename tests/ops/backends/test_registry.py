"""Which backend computes a call: the one asked for or none; else the best one that takes it."""

import threading

import pytest
import torch
from scan_cases import CPU_BACKENDS, make_arguments
from torch.utils._python_dispatch import TorchDispatchMode

from mmvim_ops import (
    Direction,
    bidirectional_selective_scan,
    causal_conv1d,
    mamba_mixer,
    scan_segment_,
    selective_scan,
    use_backend,
)
from mmvim_ops.backends import BACKENDS, choose_backend, registry
from mmvim_ops.backends.cuda import library as cuda_library
from mmvim_ops.calls import Conv1dCall, MixerDirection

each_backend = pytest.mark.parametrize('backend', CPU_BACKENDS)
needs_cpp = pytest.mark.skipif('cpp' not in CPU_BACKENDS, reason='the cpp backend is not compiled')


@pytest.fixture(autouse=True)
def unused_so_far(monkeypatch):
    """Other tests in this process compile as if use_backend had not been used."""
    monkeypatch.setattr(registry, '_ever_used', False)


class Operators(TorchDispatchMode):
    """Records which backends' operators are called."""

    def __init__(self):
        super().__init__()
        self.families = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        library, name = function.name().split('::')
        if library == 'mmvim_ops':
            self.families.add(name.split('_')[0])
        return function(*arguments, **(keywords or {}))


def scan(**more):
    return selective_scan(**make_arguments(), **more)


def convolve(taps=4, **more):
    return causal_conv1d(torch.randn(2, 6, 20), torch.randn(6, taps), **more)


def scan_both(**more):
    arguments = make_arguments()
    direction = Direction(*(arguments[name] for name in Direction._fields))
    return bidirectional_selective_scan(direction, direction, arguments['z'], **more)


def scan_segment(**more):
    arguments = make_arguments()
    direction = Direction(*(arguments[name] for name in Direction._fields))
    out, state = torch.empty_like(direction.u), torch.zeros(2, 6, 4)
    scan_segment_(out, state, direction, **more)
    return out


def mix(**more):
    shapes = (6, 4), (6,), (2 + 2 * 3, 6), (6, 2), (6,), (6, 3), (6,)
    direction = MixerDirection(*map(torch.randn, shapes))
    tokens, into, out = torch.randn(2, 9, 5), torch.randn(12, 5), torch.randn(5, 6)
    return mamba_mixer(tokens, into, [direction], out, **more)


FUNCTIONS = [scan, convolve, scan_both, scan_segment, mix]


def families(function, **more):
    """The backends whose operators compute a call."""
    with Operators() as operators:
        function(**more)
    return operators.families


@each_backend
@pytest.mark.parametrize('function', FUNCTIONS)
def test_the_named_backend_and_no_other_computes_everything(function, backend):
    expected = set() if (function, backend) == (convolve, 'torch') else {backend}
    assert families(function, backend=backend) == expected
    with use_backend(backend):
        assert families(function) == expected


@each_backend
def test_backward_stays_with_the_backend_of_forward(backend):
    arguments = make_arguments()
    u = arguments['u'].requires_grad_()
    with use_backend(backend):
        out = selective_scan(**arguments)
    with Operators() as operators:
        torch.autograd.grad(out.sum(), u)
    assert operators.families == {backend}


@needs_cpp
def test_the_argument_and_the_inner_context_win():
    with use_backend('torch'):
        assert families(scan, backend='cpp') == {'cpp'}
        with use_backend('cpp'):
            assert families(scan) == {'cpp'}
            with use_backend(None):
                assert families(scan) == {choose_backend(None, 'cpu').name}
        assert families(scan) == {'torch'}
    assert families(scan) == {'cpp'}


@needs_cpp
def test_the_context_ends_with_an_error_and_can_be_entered_again():
    context = use_backend('torch')
    with pytest.raises(ZeroDivisionError), context:
        1 / 0  # noqa: B018
    assert families(scan) == {'cpp'}
    with context, context:
        assert families(scan) == {'torch'}
    assert families(scan) == {'cpp'}


@needs_cpp
def test_threads_do_not_disturb_each_other():
    """Two threads are inside of their contexts at the same time, and a third in none."""
    barrier, found = threading.Barrier(3, timeout=60), {}

    def work(name):
        with use_backend(name):
            barrier.wait()
            found[name] = choose_backend(None, 'cpu').name
            barrier.wait()

    threads = [threading.Thread(target=work, args=(name,)) for name in ('torch', 'cpp')]
    for thread in threads:
        thread.start()
    with use_backend('torch'):
        outside = []
        other = threading.Thread(target=lambda: outside.append(choose_backend(None, 'cpu').name))
        other.start()
        other.join()
    barrier.wait()
    barrier.wait()
    for thread in threads:
        thread.join()
    assert found == {'torch': 'torch', 'cpp': 'cpp'}
    assert outside == ['cpp']


@needs_cpp
def test_threads_share_a_context_without_sharing_what_it_goes_back_to():
    """The one that enters it first is the first to leave it."""
    context, entered, left, found = use_backend('cpp'), threading.Event(), threading.Event(), []

    def look():
        found.append(choose_backend(None, 'cpu').name)

    def work():
        with context:
            entered.set()
            left.wait(60)
        look()

    thread = threading.Thread(target=work)
    with use_backend('torch'):
        with context:
            thread.start()
            assert entered.wait(60)
        look()
    left.set()
    thread.join()
    assert found == ['torch', 'cpp']  # cpp as the best one


@needs_cpp
@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split('.')[:2])) < (2, 13),
    reason='torch 2.4 breaks the graph; versions in between were not tried',
)
def test_a_compiled_function_follows_the_context():
    chosen = []

    def look(graph, _):
        chosen.append(
            {str(node.target) for node in graph.graph.nodes if 'scan' in str(node.target)}
        )
        return graph.forward

    arguments = make_arguments()

    def outside(u):
        return selective_scan(u, *list(arguments.values())[1:5])

    def inside(u):
        with use_backend('torch'):
            y = outside(u)
        return outside(y)

    u = arguments['u']
    compiled = torch.compile(outside, fullgraph=True, backend=look)
    compiled(u)
    with use_backend('torch'):
        compiled(u)
    compiled(u)
    torch.compile(inside, fullgraph=True, backend=look)(u)
    cpp, torch_ = 'mmvim_ops.cpp_scan', 'mmvim_ops.torch_scan'
    # The third graph is made as the context has been used since the first.
    assert chosen == [{cpp}, {torch_}, {cpp}, {cpp, torch_}]


def test_a_name_is_checked_at_entry(monkeypatch):
    with pytest.raises(ValueError, match=r"backend must be None or one of \(.*got 'fast'"):
        use_backend('fast')
    monkeypatch.setattr(BACKENDS['cuda'], 'missing', lambda: 'there is no CUDA device')
    with pytest.raises(ValueError, match="'cuda' is not available here: there is no CUDA device"):
        use_backend('cuda')


@needs_cpp
def test_what_the_backend_does_not_take_is_refused_in_the_context_and_taken_without():
    with use_backend('cpp'), pytest.raises(ValueError, match="'cpp' takes at most 8 taps"):
        convolve(taps=9)
    assert families(convolve, taps=9) == set()  # PyTorch's own operators


@pytest.mark.skipif('cuda' not in CPU_BACKENDS, reason='the kernels are not emulated')
@pytest.mark.parametrize('function', [selective_scan, scan_both])
def test_more_states_than_the_kernels_have_are_refused(function):
    states = cuda_library.CONSTANTS['most_states'] + 1
    arguments = make_arguments(channels=2, length=3, states=states)
    if function is scan_both:
        direction = Direction(*(arguments[name] for name in Direction._fields))
        given = (direction, direction)
    else:
        given = [arguments[name] for name in ['u', 'delta', 'A', 'B', 'C']]
    function = bidirectional_selective_scan if function is scan_both else function
    message = f'takes at most {states - 1} states, but A has {states}; backend=None chooses'
    with pytest.raises(ValueError, match=message):
        function(*given, backend='cuda')
    function(*given)


def test_a_backend_says_why_it_does_not_take_a_call(monkeypatch):
    cpp = BACKENDS['cpp']
    monkeypatch.setattr(cpp, 'missing', lambda: None)
    assert 'runs on cpu, but the input is on cuda' in cpp.why_not('cuda', torch.float32)
    monkeypatch.setattr(BACKENDS['cuda'], 'missing', lambda: None)
    assert 'but the input is torch.float64' in BACKENDS['cuda'].why_not('cuda', torch.float64)
    call = Conv1dCall(torch.randn(1, 2, 3), torch.randn(2, 100), None, True, False)
    assert BACKENDS['torch'].why_not('cpu', torch.float32, call) is None
    monkeypatch.setattr(cpp, 'missing', lambda: 'it is not compiled')
    assert cpp.why_not('cpu', torch.float32) == 'is not available here: it is not compiled'
