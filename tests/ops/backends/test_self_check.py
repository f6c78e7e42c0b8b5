"""A backend that is wrong on a device is found before it computes anything there."""

import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from scan_cases import CPU_BACKENDS, call_in_backward, make_arguments
from test_registry import FUNCTIONS, scan
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmvim_ops import selective_scan, use_backend
from mmvim_ops.backends import BACKENDS, choose_backend, registry, self_check
from mmvim_ops.backends.torch import TorchBackend
from mmvim_ops.environment import is_on

CPU = torch.device('cpu')
needs_emulation = pytest.mark.skipif(
    'cuda' not in CPU_BACKENDS, reason='there is no compiler for the emulation'
)


class Unproven(TorchBackend):
    """The best one on the CPU, and right unless a test makes it wrong. It counts its scans."""

    name = 'unproven'
    checks_itself_on = ('cpu',)
    scans = 0

    def scan(self, call):
        self.scans += 1
        return super().scan(call)


@pytest.fixture(autouse=True)
def nothing_checked_yet(monkeypatch):
    monkeypatch.setattr(self_check, '_verdicts', {})
    monkeypatch.setattr(self_check, '_failed', {})
    monkeypatch.setattr(registry, '_warned', set())
    monkeypatch.setattr(registry, '_ever_used', False)


@pytest.fixture
def unproven(monkeypatch):
    """It is preferred to every other backend."""
    backend = Unproven()
    monkeypatch.setattr(registry, 'BACKENDS', {backend.name: backend, **BACKENDS})
    return backend


@pytest.fixture
def emulated_cuda(monkeypatch):
    """Backend 'cuda', emulated, preferred on the CPU and not proven there."""
    cuda = BACKENDS['cuda']
    monkeypatch.setattr(cuda, 'only_by_name_on', (), raising=False)
    monkeypatch.setattr(cuda, 'checks_itself_on', ('cpu',), raising=False)
    monkeypatch.setattr(registry, 'BACKENDS', {'cuda': cuda, **BACKENDS})
    return cuda


class Wrong(torch.autograd.Function):
    """The same numbers; their gradient is made wrong."""

    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.change(grad), None


def wrong_gradient(field, change):
    """Of one input of every scan."""

    def patch(backend, monkeypatch):
        right = backend.scan

        def wrong(call):
            changed = Wrong.apply(getattr(call.direction, field), change)
            return right(call._replace(direction=call.direction._replace(**{field: changed})))

        monkeypatch.setattr(backend, 'scan', wrong)

    return patch


def wrong_result(operation, change):
    def patch(backend, monkeypatch):
        right = getattr(backend, operation)
        monkeypatch.setattr(backend, operation, lambda call: change(right(call)))

    return patch


def one_element(out):
    """What a race would leave behind."""
    return out + torch.zeros_like(out).index_fill_(2, torch.tensor([17]), 1.0)


def raising(out):
    raise RuntimeError('too many resources requested for launch')


FAULTS = {
    'gradient': (
        wrong_gradient('C', lambda grad: grad * 1.001),
        [
            'the scan: gradient of C (relative error 1e-03, allowed 1e-04); ',
            'the scan in both directions: gradient of forward C, gradient of backward C (relative',
        ],
    ),
    'gradient that is NaN': (
        wrong_gradient('delta', lambda grad: grad * torch.nan),
        ['the scan: gradient of delta (relative error nan, allowed 1e-04)'],
    ),
    'output': (
        wrong_result('scan', lambda results: (one_element(results[0]), results[1])),
        ['the scan: output (relative', 'the scan in both directions: output, gradient of z (rel'],
    ),
    'last state': (
        wrong_result('scan', lambda results: (results[0], results[1].neg())),
        ['the scan: last state, gradient of', 'the scan from the end: last state, gradient of'],
    ),
    'both directions': (
        wrong_result('bidirectional_scan', lambda out: out * torch.nan),
        ['the scan in both directions: every result and gradient (relative error nan'],
    ),
    'convolution': (
        wrong_result('conv1d', lambda out: out.flip(-1)),
        ['the convolution: every result and gradient (relative', 'the convolution from the end:'],
    ),
    'a kernel that does not start': (
        wrong_result('scan', raising),
        ['the scan raised RuntimeError: too many resources requested for launch; the scan from'],
    ),
    'shape': (
        wrong_result('conv1d', lambda out: out[..., 1:]),
        ['the convolution raised RuntimeError: '],
    ),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_a_wrong_backend_steps_aside_with_one_warning_and_is_refused_by_name(
    fault, unproven, monkeypatch
):
    patch, said = FAULTS[fault]
    patch(unproven, monkeypatch)
    expected = []
    for function in FUNCTIONS:
        torch.manual_seed(0)
        expected.append(function(backend='torch'))
    with pytest.warns(UserWarning) as caught:
        actual = []
        for function in FUNCTIONS:
            torch.manual_seed(0)
            actual.append(function())
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    (warning,) = caught
    assert warning.filename == scan.__code__.co_filename  # who called
    for part in (
        "does not use its backend 'unproven', which failed its check on cpu, in torch.float32: ",
        'python -m mmvim_ops',
        'MMVIM_OPS_SELF_CHECK=0',
        *said,
    ):
        assert part in str(warning.message)
    for function in FUNCTIONS:
        message = r"backend 'unproven' failed its check on cpu.*backend=None chooses one"
        with pytest.raises(ValueError, match=message):
            function(backend='unproven')
        with use_backend('unproven'), pytest.raises(ValueError, match=message):
            function()


@needs_emulation
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_the_cuda_kernels_pass_silently(dtype, emulated_cuda, recwarn):
    assert choose_backend(None, CPU, dtype) is emulated_cuda
    assert choose_backend('cuda', CPU, dtype) is emulated_cuda
    assert self_check._verdicts == {('cuda', CPU, dtype): None}
    assert not recwarn.list


@needs_emulation
def test_a_wrong_cuda_kernel_is_found(emulated_cuda, monkeypatch):
    """What backward reads of the sequence is moved by a step, below the operators."""
    from mmvim_ops.backends.cuda import scan as cuda_scan

    right = cuda_scan.run_backward

    def wrong(directions, reverse, z, softplus, scale, grad_out, *more):
        right(directions, reverse, z, softplus, scale, grad_out.roll(1, -1), *more)

    monkeypatch.setattr(cuda_scan, 'run_backward', wrong)
    with pytest.warns(UserWarning, match="'cuda', which failed.*: the scan: gradient of u"):
        assert choose_backend(None, CPU) is not emulated_cuda
    with pytest.raises(ValueError, match=r"'cuda' failed its check on cpu, in torch\.bfloat16"):
        choose_backend('cuda', CPU, torch.bfloat16)


def test_a_wrong_mixer_is_found(emulated_cuda, monkeypatch):
    """Both directions get the forward one's step sizes; every single operation is right."""
    from mmvim_ops.backends.cuda import mixer

    right = mixer._select

    def wrong(*given):
        selected = right(*given)
        return selected._replace(delta=selected.delta[:1].repeat(2, 1, 1))

    monkeypatch.setattr(mixer, '_select', wrong)
    with pytest.warns(UserWarning, match="'cuda', which failed[^;]*: the mixer: "):
        assert choose_backend(None, CPU) is not emulated_cuda


@needs_emulation
def test_products_in_tensorfloat32_are_no_fault_on_a_gpu(emulated_cuda, monkeypatch):
    """Users may have them there. Factors are rounded to ten bits."""

    def rounding(product):
        def rounded(*factors, **options):
            if factors[0].dtype == torch.float32:
                factors = (x if x is None else cut_off(x) for x in factors)
            return product(*factors, **options)

        return rounded

    def cut_off(x):
        return (x.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)

    for module, name in ((torch, 'mm'), (torch, 'bmm'), (torch.nn.functional, 'linear')):
        monkeypatch.setattr(module, name, rounding(getattr(module, name)))
    found = self_check.differences(emulated_cuda, CPU, torch.float32, TorchBackend)
    wrong = [difference for difference in found if difference.is_wrong()]
    assert {difference.operation for difference in wrong} == {'the mixer'}
    mixer = self_check._examples()[-1]
    allowed = self_check.allowed(mixer, torch.device('cuda'), torch.float32)
    assert self_check.largest_error(wrong) < allowed / 2


def test_each_device_and_dtype_is_checked_once(unproven):
    scan()
    after_one = unproven.scans
    assert after_one > 1
    scan()
    assert unproven.scans == after_one + 1
    half = make_arguments(dtype=torch.bfloat16)
    selective_scan(**half)
    assert unproven.scans == 2 * after_one + 1
    # A backend is not checked on a device where it is proven, nor for a question without one.
    unproven.checks_itself_on = ('cuda',)
    selective_scan(**make_arguments(dtype=torch.float64))
    choose_backend(None, 'cuda')
    assert unproven.scans == 2 * after_one + 2


def test_a_dtype_that_is_right_is_used_beside_one_that_is_wrong(unproven, monkeypatch):
    right = unproven.scan

    def wrong_in_bfloat16(call):
        out, last_state = right(call)
        return (-out if out.dtype == torch.bfloat16 else out), last_state

    monkeypatch.setattr(unproven, 'scan', wrong_in_bfloat16)
    with pytest.warns(UserWarning, match=r'in torch\.bfloat16'):
        assert choose_backend(None, CPU, torch.bfloat16) is not unproven
    assert choose_backend(None, CPU, torch.float32) is unproven


def test_the_next_backend_that_is_right_is_chosen(unproven, monkeypatch):
    """A second one that is wrong, too, has a warning of its own."""
    second = Unproven()
    second.name = 'second'
    every = {'unproven': unproven, 'second': second, **BACKENDS}
    monkeypatch.setattr(registry, 'BACKENDS', every)
    for backend in (unproven, second):
        FAULTS['output'][0](backend, monkeypatch)
    with pytest.warns(UserWarning) as caught:
        assert choose_backend(None, CPU).name in BACKENDS
    assert ["'unproven'" in str(w.message) for w in caught] == [True, False]
    assert "'second'" in str(caught[1].message)


def test_the_caller_notices_nothing(unproven):
    """Random numbers, modes and gradients are as they were; the check runs in none of them."""

    class Watch(TorchDispatchMode):
        """Another thread's operations do not reach it."""

        seen = 0

        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            self.seen += 'backward' in str(function)
            return function(*arguments, **(keywords or {}))

    arguments = make_arguments()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with (
        torch.inference_mode(),
        torch.autocast('cpu', torch.bfloat16),
        torch.device('meta'),
        use_backend('torch'),
        Watch() as watch,
    ):
        selective_scan(**arguments, backend='unproven')
        assert torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()
        assert torch.is_autocast_enabled('cpu')
        assert torch.empty(1).is_meta
        assert registry.selected(None) == 'torch'
    assert watch.seen == 0
    assert self_check._verdicts == {('unproven', CPU, torch.float32): None}
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_compiled_is_not_checked_and_avoids_what_has_failed(unproven, monkeypatch):
    chosen = []

    def look(graph, _):
        chosen.append({str(n.target) for n in graph.graph.nodes if 'mmvim' in str(n.target)})
        return graph.forward

    arguments = make_arguments()

    def function(u):
        return selective_scan(u, *list(arguments.values())[1:5])

    FAULTS['output'][0](unproven, monkeypatch)
    monkeypatch.setattr(unproven, 'limit', lambda call: None)
    compiled = torch.compile(function, fullgraph=True, backend=look)
    compiled(arguments['u'])
    assert self_check._verdicts == {}
    with pytest.warns(UserWarning, match="'unproven', which failed"):
        function(arguments['u'])
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        compiled(arguments['u'])
    unproven_one, next_one = chosen
    assert unproven_one == {'mmvim_ops.torch_scan'}
    assert next_one == {f'mmvim_ops.{choose_backend(None, CPU).name}_scan'}


def test_what_is_traced_captured_or_without_data_is_not_checked(unproven, monkeypatch):
    arguments = make_arguments()
    with FakeTensorMode() as mode:
        fakes = {
            name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x
            for name, x in arguments.items()
        }
        selective_scan(**fakes)
    selective_scan(**fakes)  # they are known outside of the mode, too
    selective_scan(
        **{
            name: x.to('meta') if isinstance(x, torch.Tensor) else x
            for name, x in arguments.items()
        }
    )
    u, *others = list(arguments.values())[:5]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # about shapes that are traced as constants
        torch.jit.trace(lambda u: selective_scan(u, *others), u, check_trace=False)
    with monkeypatch.context() as patch:
        patch.setattr(self_check, '_is_capturing', lambda device: True)
        scan()
    assert self_check._verdicts == {}
    scan()
    assert self_check._verdicts == {('unproven', CPU, torch.float32): None}


def test_a_call_inside_of_a_backward_pass_leaves_the_check_to_another(unproven):
    """On a GPU the thread that runs it is the one that would have to run the check's backward."""
    call_in_backward(scan)
    assert unproven.scans == 1
    assert self_check._verdicts == {}


def test_too_little_memory_is_no_verdict(unproven, monkeypatch):
    def no_memory(call):
        raise torch.cuda.OutOfMemoryError('CUDA out of memory')

    with monkeypatch.context() as patch:
        patch.setattr(unproven, 'scan', no_memory)
        assert choose_backend(None, CPU) is unproven
    assert self_check._verdicts == {}
    scan()
    assert self_check._verdicts == {('unproven', CPU, torch.float32): None}


def test_threads_that_come_meanwhile_wait_for_the_verdict(unproven, monkeypatch):
    checks, chosen = [], []
    right = self_check.differences

    def slow(*arguments):
        checks.append(threading.current_thread())
        time.sleep(0.2)  # the others arrive
        return right(*arguments)

    monkeypatch.setattr(self_check, 'differences', slow)
    FAULTS['output'][0](unproven, monkeypatch)
    barrier = threading.Barrier(4, timeout=60)

    def work():
        barrier.wait()
        chosen.append(choose_backend(None, CPU))

    threads = [threading.Thread(target=work) for _ in range(4)]
    with pytest.warns(UserWarning, match="'unproven', which failed"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(checks) == 1
    assert checks[0] not in threads
    assert len(chosen) == 4
    assert unproven not in chosen


def test_a_reference_is_computed_once_and_by_one_thread(unproven):
    """Beside other work, threads delay its many small operations by seconds. What is checked has
    those that its calls will have."""
    seen = []

    class Reference(TorchBackend):
        def scan(self, call):
            seen.append((call.direction.u.dtype, torch.get_num_threads()))
            return super().scan(call)

    checked = []
    right = unproven.scan
    unproven.scan = lambda call: checked.append(torch.get_num_threads()) or right(call)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            found = self_check.differences(unproven, CPU, dtype, Reference)
            assert not any(difference.is_wrong() for difference in found)
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as another:
            assert another.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == [(torch.float64, 1)] * 4  # one in each direction, and both at once
    assert checked == [3] * 8


def test_it_can_be_switched_off(unproven, monkeypatch, recwarn):
    FAULTS['output'][0](unproven, monkeypatch)
    monkeypatch.setattr(self_check, 'ENABLED', False)
    assert choose_backend(None, CPU) is unproven
    assert choose_backend('unproven', CPU) is unproven
    assert not recwarn.list


@pytest.mark.parametrize(('value', 'expected'), [(None, True), ('1', True), ('0', False)])
def test_the_environment_switches_it_off(value, expected, monkeypatch):
    monkeypatch.delenv('MMVIM_OPS_SELF_CHECK', raising=False)
    if value is not None:
        monkeypatch.setenv('MMVIM_OPS_SELF_CHECK', value)
    assert is_on(self_check.SWITCH) is expected
    monkeypatch.setenv('MMVIM_OPS_SELF_CHECK', 'yes')
    with pytest.raises(ValueError, match="MMVIM_OPS_SELF_CHECK must be 0 or 1, got 'yes'"):
        is_on(self_check.SWITCH)


@pytest.mark.parametrize('name', ['cuda', 'triton'])
def test_the_backends_for_gpus_are_checked_there(name):
    assert BACKENDS[name].checks_itself_on == ('cuda',)


@pytest.mark.parametrize(
    'name',
    [
        pytest.param(name, marks=[pytest.mark.slow] if name == 'triton' else [])  # interpreted
        for name in CPU_BACKENDS
    ],
)
def test_right_backends_are_far_from_the_tolerances(name):
    """A GPU computes exponentials a little less exactly."""
    backend = BACKENDS[name]
    for dtype, share in ((torch.float32, 0.05), (torch.bfloat16, 0.5)):
        for found in self_check.differences(backend, CPU, dtype, self_check.Specification):
            assert found.error < share * found.tolerance, found
