"""Arguments for the scan, and how two results are compared."""

import random

import torch

from mmvim_ops import available_backends
from mmvim_ops.backends import BACKENDS

CPU_BACKENDS = [name for name in available_backends() if BACKENDS[name].runs_on('cpu')]
DOUBLE_BACKENDS = [name for name in CPU_BACKENDS if torch.float64 in BACKENDS[name].dtypes]
AS_PLAIN = 4  # times the error of plain PyTorch in the same dtypes is as good, where terms cancel
TENSORS = ('u', 'delta', 'A', 'B', 'C', 'D', 'z', 'delta_bias')


def call_in_backward(call, device='cpu'):
    """Call a function in the thread that runs a backward pass on this device."""

    class Inside(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            call()
            return grad

    Inside.apply(torch.ones(1, device=device, requires_grad=True)).backward()


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


def map_tensors(function, x):
    """``x`` with ``function`` of every tensor in its dicts, lists and tuples."""
    if isinstance(x, torch.Tensor):
        return function(x)
    if isinstance(x, dict):
        return {name: map_tensors(function, value) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        items = [map_tensors(function, item) for item in x]
        return type(x)(*items) if hasattr(x, '_fields') else type(x)(items)
    return x


def to_double(x):
    """The same numbers in float64."""
    return map_tensors(lambda t: t.detach().double() if t.is_floating_point() else t, x)


def upstream(x):
    """A random gradient of ``x`` that every dtype holds exactly."""
    return torch.randn(x.shape).bfloat16().to(x)


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
            (upstream(out), upstream(last_state)),
            allow_unused=True,
        )
        results.update({f'grad of {name}': grad for name, grad in zip(names, grads, strict=True)})
    return results


def relative_error(actual, expected):
    """‖actual − expected‖ / ‖expected‖; the plain difference where that is tiny."""
    difference = (actual.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp_min(1e-6)).item()


def assert_same(actual, expected, tolerance, exact=None):
    """Compare two results of :func:`run`.

    Args:
        exact (Callable | None): Computes them in float64. It is asked where the two differ: of sums
            whose terms cancel, float32 may give ``expected`` no better.
    """
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert actual[name].shape == value.shape, name
        error = relative_error(actual[name], value)
        if error >= tolerance and exact is not None:
            assert_accurate(actual, expected, exact(), tolerance)
            return
        assert error < tolerance, f'{name}: relative error {error:.2e}'


def assert_accurate(actual, plain, exact, tolerance):
    """Compare a result of :func:`run` with that in float64.

    An error may be as large as ``tolerance`` or, up to a hundred times that, as ``AS_PLAIN`` errors
    of ``plain``, which plain PyTorch computed in the dtypes of ``actual``.
    """
    assert actual.keys() == plain.keys() == exact.keys()
    for name, value in exact.items():
        assert actual[name].dtype == plain[name].dtype, name
        assert actual[name].shape == value.shape, name
        error, of_plain = (relative_error(x[name], value) for x in (actual, plain))
        bound = max(tolerance, min(AS_PLAIN * of_plain, 100 * tolerance))
        assert error < bound, f'{name}: relative error {error:.2e}, {of_plain:.2e} in plain PyTorch'
