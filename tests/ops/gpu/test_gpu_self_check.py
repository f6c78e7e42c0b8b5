"""The check that a backend makes of itself before its first call on a GPU."""

import pytest
import torch
from gpu_cases import DEVICE, each_backend, to_device
from scan_cases import call_in_backward, make_arguments

from mmvim_ops import selective_scan
from mmvim_ops.backends import self_check

pytestmark = pytest.mark.skipif(DEVICE == 'cpu', reason='the emulation is not checked')
MOST_MEMORY = 256 << 20  # cuBLAS keeps 32 MiB or more for each thread and stream


@pytest.fixture(autouse=True)
def nothing_checked_yet(monkeypatch):
    """The check is switched off for the other tests here."""
    monkeypatch.setattr(self_check, 'ENABLED', True)
    monkeypatch.setattr(self_check, '_verdicts', {})
    monkeypatch.setattr(self_check, '_failed', {})


@each_backend
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_it_passes_on_the_stream_of_the_call(backend, dtype):
    given = to_device(make_arguments(dtype=dtype))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, random = torch.cuda.memory_allocated(), torch.cuda.get_rng_state()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        selective_scan(**given, backend=backend)
        assert torch.cuda.current_stream() == stream
    assert self_check._verdicts == {(backend, given['u'].device, dtype): None}
    assert torch.equal(torch.cuda.get_rng_state(), random)
    assert torch.cuda.max_memory_allocated() - before < MOST_MEMORY


@pytest.fixture
def tensorfloat32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('high')
    yield
    torch.set_float32_matmul_precision(before)


@each_backend
def test_products_may_be_in_tensorfloat32(backend, tensorfloat32):
    given = to_device(make_arguments())
    selective_scan(**given, backend=backend)
    assert self_check._verdicts == {(backend, given['u'].device, torch.float32): None}


@each_backend
def test_nothing_is_checked_while_a_graph_is_captured_or_backward_runs(backend):
    """The latter would wait for itself, for ever."""
    given = to_device(make_arguments())
    device = given['u'].device
    self_check._verdicts[backend, device, torch.float32] = None
    expected = selective_scan(**given, backend=backend)
    self_check._verdicts.clear()
    call_in_backward(lambda: selective_scan(**given, backend=backend), device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = selective_scan(**given, backend=backend)
    assert self_check._verdicts == {}
    graph.replay()
    assert torch.equal(out, expected)
