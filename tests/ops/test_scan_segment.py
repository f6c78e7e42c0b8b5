"""A sequence scanned in segments gives what the whole sequence gives."""

import random
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from scan_cases import (
    CPU_BACKENDS,
    DOUBLE_BACKENDS,
    make_arguments,
    random_arguments,
    relative_error,
)

from mmvim_ops import Direction, scan_segment_
from mmvim_ops.naive import compute_dtype, selective_scan_naive

each_backend = pytest.mark.parametrize('backend', CPU_BACKENDS)


def segment(direction, start, stop):
    """Some steps of a direction: views, as a caller would pass them."""
    matrices = (m[..., start:stop] if m.ndim > 2 else m for m in (direction.B, direction.C))
    B, C = matrices
    u, delta = direction.u[..., start:stop], direction.delta[..., start:stop]
    return direction._replace(u=u, delta=delta, B=B, C=C)


@each_backend
@pytest.mark.parametrize('seed', range(30))
def test_segments_equal_whole(backend, seed):
    pick = random.Random(seed)
    dtype = pick.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16])
    if dtype == torch.float64 and backend not in DOUBLE_BACKENDS:
        dtype = torch.float32
    arguments = random_arguments(seed, dtype=dtype)
    z, softplus, reverse = (arguments.pop(k) for k in ('z', 'delta_softplus', 'reverse'))
    direction = Direction(**arguments)
    y, last = selective_scan_naive(
        **arguments, delta_softplus=softplus, reverse=reverse, return_last_state=True
    )
    accumulate, scale = pick.random() < 0.5, pick.choice([1.0, 0.5])
    before = torch.randn(y.shape).to(dtype)
    wide = compute_dtype(dtype)
    gate = 1 if z is None else F.silu(z.to(wide))
    expected = (y.to(wide) + (before.to(wide) if accumulate else 0)) * gate * scale

    length = y.shape[-1]
    borders = sorted({0, length, *(pick.randint(0, length) for _ in range(3))})
    segments = list(pairwise(borders))
    out, state = before.clone(), torch.zeros(last.shape, dtype=wide)
    for start, stop in reversed(segments) if reverse else segments:
        here = slice(start, stop)
        scan_segment_(
            *(out[..., here], state, segment(direction, start, stop)),
            *(None if z is None else z[..., here], softplus),
            **dict(reverse=reverse, accumulate=accumulate, scale=scale, backend=backend),
        )
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert relative_error(out, expected) < tolerance
    assert relative_error(state, last) < 1e-5
    assert out.dtype == dtype


def arguments_of_a_segment():
    arguments = make_arguments()
    z, softplus = arguments.pop('z'), arguments.pop('delta_softplus')
    arguments.pop('reverse')
    direction = Direction(**arguments)
    state = torch.zeros(*direction.u.shape[:2], direction.A.shape[1])
    return torch.empty_like(direction.u), state, direction, z, softplus


@pytest.mark.parametrize(
    ('change', 'error', 'message'),
    [
        (lambda out, state: (out[..., 1:], state), ValueError, 'out must have shape'),
        (lambda out, state: (out.half(), state), TypeError, 'out must be torch.float32'),
        (lambda out, state: (out[:, :1].expand_as(out), state), ValueError, 'of its own'),
        (lambda out, state: (out, state[..., 1:]), ValueError, 'state must have shape'),
        (lambda out, state: (out, state.bfloat16()), TypeError, 'state must be torch.float32'),
        (lambda out, state: (out, state.mT.contiguous().mT), ValueError, 'must be contiguous'),
        (lambda out, state: (out, state.requires_grad_()), ValueError, 'for inference'),
    ],
)
def test_bad_memory(change, error, message):
    out, state, *rest = arguments_of_a_segment()
    out, state = change(out, state)
    with pytest.raises(error, match=message):
        scan_segment_(out, state, *rest)


@each_backend
def test_empty_segment(backend):
    out, state, direction, z, softplus = arguments_of_a_segment()
    state.fill_(3)
    scan_segment_(
        out[..., :0], state, segment(direction, 0, 0), z[..., :0], softplus, backend=backend
    )
    assert (state == 3).all()


@pytest.mark.skipif('cpp' not in CPU_BACKENDS, reason='the cpp backend is not compiled')
def test_opcheck():
    out, state, direction, z, softplus = arguments_of_a_segment()
    torch.library.opcheck(
        torch.ops.mmvim_ops.cpp_scan_segment.default,
        (*direction[:6], z, direction.delta_bias, state, out, softplus, False, True, 0.5),
    )
