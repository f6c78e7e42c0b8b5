"""The bidirectional scan is the gated sum of two scans."""

import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from scan_cases import (
    CPU_BACKENDS,
    DOUBLE_BACKENDS,
    assert_same,
    make_arguments,
    random_arguments,
    to_double,
    upstream,
)

from mmvim_ops import Direction, bidirectional_selective_scan
from mmvim_ops.naive import compute_dtype, selective_scan_naive

each_backend = pytest.mark.parametrize('backend', CPU_BACKENDS)


def two_directions(seed, **fixed):
    """Two directions of equal sizes, the gate, and the softplus flag."""
    pick = random.Random(seed)
    first = random_arguments(seed, **fixed)
    batch, channels, length = first['u'].shape
    second = make_arguments(
        batch,
        channels,
        length,
        first['A'].shape[1],
        skip=pick.random() < 0.5,
        groups_B=pick.choice([None, 0]),
        groups_C=pick.choice([None, 0]),
        bias=pick.random() < 0.5,
        softplus=first['delta_softplus'],
        channels_last=pick.random() < 0.5,
        dtype=first['u'].dtype,
        seed=seed + 1,
    )
    first['B'], first['C'] = (first[m] if first[m].ndim < 4 else first[m][:, :1] for m in 'BC')
    directions = [
        Direction(*(arguments[name] for name in Direction._fields)) for arguments in (first, second)
    ]
    return *directions, first['z'], first['delta_softplus']


def specification(forward, backward, z=None, delta_softplus=False, *, scale=1.0):
    dtype = compute_dtype(forward.u.dtype)
    out = sum(
        selective_scan_naive(
            *direction[:6], None, direction.delta_bias, delta_softplus, reverse=reverse
        ).to(dtype)
        for direction, reverse in ((forward, False), (backward, True))
    )
    return (out * (1 if z is None else F.silu(z.to(dtype))) * scale).to(forward.u.dtype)


def run(function, forward, backward, z, *rest, **more):
    """The output and the gradient of every tensor, by name."""

    def leaf(x):
        return x if x is None else x.detach().requires_grad_()

    forward, backward, z = Direction(*map(leaf, forward)), Direction(*map(leaf, backward)), leaf(z)
    out = function(forward, backward, z, *rest, **more)
    tensors = {f'forward {name}': x for name, x in forward._asdict().items()}
    tensors |= {f'backward {name}': x for name, x in backward._asdict().items()} | {'z': z}
    tensors = {name: x for name, x in tensors.items() if x is not None}
    torch.manual_seed(1)
    grads = torch.autograd.grad(out, list(tensors.values()), upstream(out), allow_unused=True)
    return {'out': out, **dict(zip(tensors, grads, strict=True))}


@each_backend
@pytest.mark.parametrize('first', range(0, 100, 50))
def test_agrees_with_two_scans_on_random_arguments(first, backend):
    for seed in range(first, first + 50):
        arguments = two_directions(seed)
        actual = run(bidirectional_selective_scan, *arguments, scale=0.5, backend=backend)
        assert_same(
            actual,
            run(specification, *arguments, scale=0.5),
            2e-5,
            partial(run, specification, *to_double(arguments), scale=0.5),
        )


@each_backend
def test_directions_may_share_tensors(backend):
    first, _, z, _ = two_directions(3, channels_last=True, gate=True, length=300)
    u = first.u.requires_grad_()
    grads = []
    for function, more in (
        (bidirectional_selective_scan, dict(backend=backend)),
        (specification, {}),
    ):
        out = function(first, first._replace(A=first.A * 2), z, True, scale=0.5, **more)
        grads.append(torch.autograd.grad(out.sum(), u)[0])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@each_backend
def test_views_of_one_projection_are_used_as_they_are(backend):
    """As in the Vim block: x and z are halves of one (batch, length, 2 · channels) tensor."""
    xz = torch.randn(2, 40, 32)
    x, z = xz.transpose(1, 2).chunk(2, dim=1)
    dbc = torch.randn(2, 40, 3 + 2 * 4)
    _, B, C = dbc.transpose(1, 2).split([3, 4, 4], dim=1)
    direction = Direction(x, x * 0.1, -torch.rand(16, 4), B, C)
    out = bidirectional_selective_scan(direction, direction, z, True, backend=backend)
    torch.testing.assert_close(
        out, specification(direction, direction, z, True), rtol=1e-4, atol=1e-5
    )
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize('backend', DOUBLE_BACKENDS)
def test_gradcheck_passes_in_double_precision(backend):
    forward, backward, z, softplus = two_directions(
        8,
        batch=2,
        length=6,
        channels=3,
        states=2,
        groups_B=0,
        groups_C=0,
        gate=True,
        dtype=torch.float64,
    )
    given = [x.requires_grad_() for x in (*forward, *backward, z) if x is not None]

    def scan(*_):
        return bidirectional_selective_scan(
            forward, backward, z, softplus, scale=0.7, backend=backend
        )

    assert torch.autograd.gradcheck(scan, given)


@each_backend
@pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_low_precision_is_computed_in_float32(dtype, tolerance, backend):
    arguments = two_directions(1, length=100, dtype=dtype)
    assert_same(
        run(bidirectional_selective_scan, *arguments, backend=backend),
        run(specification, *arguments),
        tolerance,
    )


def test_a_bad_argument_is_named_with_its_direction():
    forward, backward, z, softplus = two_directions(0, batch=2, length=5, channels=4)
    with pytest.raises(ValueError, match='backward: A must have shape'):
        bidirectional_selective_scan(forward, backward._replace(A=torch.randn(3, 4)), z, softplus)
    with pytest.raises(ValueError, match=r'forward\.u and backward\.u must have the same shape'):
        bidirectional_selective_scan(forward, two_directions(0, batch=1, length=5, channels=4)[1])
    with pytest.raises(TypeError, match='scale must be a number, got str'):
        bidirectional_selective_scan(forward, backward, z, scale='half')
