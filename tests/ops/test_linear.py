"""The product by convolution or kernel is the linear layer, with its gradients."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from mmvim_ops import linear

module = importlib.import_module('mmvim_ops.linear')  # the name is taken by its function


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize(
    ('shape', 'out'), [((1, 300, 24), 40), ((3, 17, 12), 5), ((2, 1, 8), 8), ((1, 1, 1), 1)]
)
def test_equals_linear(shape, out, bias):
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    layer = torch.nn.Linear(shape[-1], out, bias=bias)
    assert module._as_convolution(x, layer.weight)
    given = (x, *layer.parameters())
    ours, theirs = linear(x, layer.weight, layer.bias), F.linear(x, layer.weight, layer.bias)
    assert ours.shape == theirs.shape
    grad = torch.randn_like(theirs)
    results = zip(
        (ours, *torch.autograd.grad(ours, given, grad)),
        (theirs, *torch.autograd.grad(theirs, given, grad)),
        strict=True,
    )
    for ours, theirs in results:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('threads', [1, 2])
@pytest.mark.parametrize('shape', [(2, 3, 24), (1, 900, 24)])
def test_onednn_computes_it_on_any_number_of_threads(shape, threads):
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(40, 24)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            linear(x, weight)
    finally:
        torch.set_num_threads(before)
    assert 'aten::mkldnn_convolution' in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize(('shape', 'out'), [((1, 300, 24), 40), ((3, 17, 12), 5), ((1, 1, 1), 1)])
def test_without_gradients_it_is_the_same(shape, out, bias):
    torch.manual_seed(0)
    x, layer = torch.randn(shape), torch.nn.Linear(shape[-1], out, bias=bias)
    with torch.no_grad():
        ours, theirs = linear(x, layer.weight, layer.bias), layer(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_vmap_has_gradients():
    x, weights = torch.randn(2, 5, 8), torch.randn(3, 4, 8, requires_grad=True)
    # Another way to the weights: a gradient that lacks one of the two is no error.
    ours = torch.func.vmap(lambda weight: linear(x, weight) + weight.sum())(weights)
    theirs = torch.stack([F.linear(x, weight) + weight.sum() for weight in weights])
    grad = torch.randn_like(theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(ours, weights, grad),
        torch.autograd.grad(theirs, weights, grad),
        rtol=1e-4,
        atol=1e-4,
    )


def test_forward_mode_works_without_gradients():
    x, weight, change = torch.randn(2, 5, 8), torch.randn(4, 8), torch.randn(4, 8)
    with torch.no_grad():
        _, tangent = torch.func.jvp(lambda weight: linear(x, weight), (weight,), (change,))
    torch.testing.assert_close(tangent, F.linear(x, change), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    'x',
    [
        torch.randn(5, 8),
        torch.randn(2, 0, 8),
        torch.randn(2, 8, 5).transpose(1, 2),
        torch.randn(2, 5, 8, dtype=torch.float64),
    ],
)
def test_everything_else_goes_the_usual_way(x):
    weight = torch.randn(3, 8, dtype=x.dtype)
    assert not module._as_convolution(x, weight)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
