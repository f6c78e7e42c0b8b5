"""Arguments for the scan, and how two results are compared."""

import random

import torch

from mmvim_ops import available_backends
from mmvim_ops.backends import BACKENDS

CPU_BACKENDS = [name for name in available_backends() if BACKENDS[name].runs_on('cpu')]
DOUBLE_BACKENDS = [name for name in CPU_BACKENDS if torch.float64 in BACKENDS[name].dtypes]
TENSORS = ('u', 'delta', 'A', 'B', 'C', 'D', 'z', 'delta_bias')


def make_arguments(
    batch=2,
    channels=6,
    length=20,
    states=4,
    groups_B=1,
    groups_C=1,
    skip=True,
    gate=True,
    bias=True,
    softplus=True,
    reverse=False,
    dtype=torch.float32,
    channels_last=False,
    seed=0,
):
    """Keyword arguments of selective_scan. groups: None constant, 0 three dimensions, else four."""
    torch.manual_seed(seed)

    def sequence():
        if channels_last:
            return torch.randn(batch, length, channels, dtype=dtype).transpose(1, 2)
        return torch.randn(batch, channels, length, dtype=dtype)

    def matrix(groups):
        if groups is None:
            return torch.randn(channels, states, dtype=dtype)
        if groups == 0:
            return torch.randn(batch, states, length, dtype=dtype)
        return torch.randn(batch, groups, states, length, dtype=dtype)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    u, z = sequence(), sequence()
    delta = sequence() * 0.5 if softplus else torch.rand_like(sequence()) * 0.5
    tensors = dict(
        u=u,
        delta=delta,
        A=-torch.rand(channels, states, dtype=wide) * 2 - 0.05,
        B=matrix(groups_B),
        C=matrix(groups_C),
        D=torch.randn(channels, dtype=wide) if skip else None,
        z=z if gate else None,
        delta_bias=torch.rand(channels, dtype=wide) * 0.5 if bias else None,
    )
    return dict(tensors, delta_softplus=softplus, reverse=reverse)


def random_arguments(seed, **fixed):
    """One draw over everything that :func:`make_arguments` can vary."""
    pick = random.Random(seed)
    per_group = pick.choice([1, 2, 3, 8, 17])
    groups = pick.choice([1, 1, 2, 3])
    drawn = dict(
        batch=pick.choice([1, 2, 3]),
        channels=per_group * groups,
        length=pick.choice([1, 2, 3, 7, 16, 33, 64, 100]),
        states=pick.choice([1, 2, 5, 8, 16, 20]),
        groups_B=pick.choice([None, groups, 0 if groups == 1 else groups]),
        groups_C=pick.choice([None, groups, 0 if groups == 1 else groups]),
        channels_last=pick.random() < 0.5,
        seed=seed,
        **{flag: pick.random() < 0.5 for flag in ('skip', 'gate', 'bias', 'softplus', 'reverse')},
    )
    return make_arguments(**{**drawn, **fixed})


def run(function, arguments, with_gradients=True, **more):
    """Output, last state and the gradient of every tensor argument, by name."""
    arguments = {
        name: value.detach().requires_grad_(with_gradients)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in arguments.items()
    }
    out, last_state = function(**arguments, **more, return_last_state=True)
    results = {'out': out, 'last_state': last_state}
    if with_gradients:
        torch.manual_seed(1)
        names = [name for name in TENSORS if arguments[name] is not None]
        grads = torch.autograd.grad(
            (out, last_state),
            [arguments[name] for name in names],
            (torch.randn(out.shape).to(out), torch.randn(last_state.shape).to(last_state)),
            allow_unused=True,
        )
        results.update({f'grad of {name}': grad for name, grad in zip(names, grads, strict=True)})
    return results


def relative_error(actual, expected):
    """‖actual − expected‖ / ‖expected‖; the plain difference where that is tiny."""
    difference = (actual.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp_min(1e-6)).item()


def assert_same(actual, expected, tolerance):
    """Compare two results of :func:`run`."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert actual[name].shape == value.shape, name
        error = relative_error(actual[name], value)
        assert error < tolerance, f'{name}: relative error {error:.2e}'
