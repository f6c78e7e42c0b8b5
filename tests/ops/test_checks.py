"""Bad arguments are refused before any kernel runs, by a message that says what is wrong."""

import pytest
import torch
from scan_cases import make_arguments

from mmvim_ops import available_backends, selective_scan

x = torch.randn
BAD = [
    ('u', [1.0], TypeError, 'u must be a tensor, got list'),
    ('u', x(2, 6, 20).long(), TypeError, 'u must be float64.*got torch.int64'),
    ('u', x(6, 20), ValueError, r'u must have 3 dimensions.*got 2: shape \(6, 20\)'),
    ('delta', None, TypeError, 'delta must be a tensor, got NoneType'),
    (
        'delta',
        x(2, 6, 21),
        ValueError,
        r'delta must have shape \(batch, channels, length\) = \(2, 6, 20\), got \(2, 6, 21\)',
    ),
    ('delta', x(2, 6, 20).double(), TypeError, 'delta is torch.float64 and u is torch.float32'),
    ('A', x(6, 4, dtype=torch.complex64), TypeError, 'A must be real, got torch.complex64'),
    ('A', x(6), ValueError, 'A must have 2 dimensions'),
    ('A', x(5, 4), ValueError, r'A must have shape \(channels, states\) = \(6, 4\), got \(5, 4\)'),
    ('A', x(6, 0), ValueError, 'A must have at least one state'),
    ('B', x(6, 5), ValueError, r'B must have shape \(channels, states\) = \(6, 4\), got \(6, 5\)'),
    (
        'B',
        x(2, 5, 20),
        ValueError,
        r'B must have shape \(batch, states, length\) = \(2, 4, 20\), got \(2, 5, 20\)',
    ),
    ('B', x(2, 4, 4, 20), ValueError, 'B has 4 groups, which does not divide the 6 channels'),
    ('B', x(4), ValueError, r'B must have 2 dimensions.* or 4 .*got 1: shape \(4,\)'),
    ('B', x(2, 3, 4, 20), ValueError, 'B and C must have the same number of groups, got 3 and 1'),
    ('C', x(2, 4, 20).to('meta'), ValueError, 'C must be on the device of u, cpu, got meta'),
    ('C', x(2, 0, 4, 20), ValueError, 'C has 0 groups'),
    ('D', x(5), ValueError, r'D must have shape \(channels,\) = \(6,\), got \(5,\)'),
    ('z', x(2, 20, 6), ValueError, 'z must have shape'),
    ('z', 1.0, TypeError, 'z must be a tensor, got float'),
    ('delta_bias', x(6, 1), ValueError, 'delta_bias must have shape'),
    ('delta_bias', x(6).to(torch.float8_e5m2), TypeError, 'delta_bias must be float64'),
    ('reverse', x(2), TypeError, 'reverse must be True or False, got Tensor'),
    ('delta_softplus', None, TypeError, 'delta_softplus must be True or False, got NoneType'),
    ('return_last_state', 'no', TypeError, 'return_last_state must be True or False, got str'),
    ('backend', ['cpp'], ValueError, r"backend must be None or one of .*got \['cpp'\]"),
    ('backend', 'fast', ValueError, r"backend must be None or one of \(.*'torch'.*got 'fast'"),
]


@pytest.mark.parametrize(
    'name, value, error, message', BAD, ids=[f'{name}-{i}' for i, (name, *_) in enumerate(BAD)]
)
def test_a_bad_argument_is_named(name, value, error, message):
    with pytest.raises(error, match=message):
        selective_scan(**{**make_arguments(groups_B=0, groups_C=0), name: value})


def test_the_pure_torch_backend_is_always_there():
    assert 'torch' in available_backends()
