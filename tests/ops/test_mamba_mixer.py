"""The whole mixer is the composition of its parts, forward and backward, however it is computed."""

import random

import pytest
import torch
from scan_cases import CPU_BACKENDS, upstream
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmvim_ops import MixerDirection, mamba_mixer
from mmvim_ops.naive import mamba_mixer_naive

each_backend = pytest.mark.parametrize('backend', CPU_BACKENDS)
each_recompute = pytest.mark.parametrize('recompute', ['activations', 'all', 'none'])
needs_cpp = pytest.mark.skipif('cpp' not in CPU_BACKENDS, reason='the cpp backend is not compiled')


def make_mixer(seed, length, *, batch=2, dims=8, inner=20, dtype=torch.float64, **fixed):
    """Tokens, the other positional arguments and the keyword arguments of a random mixer."""
    pick = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    states, rank, taps = pick.choice([1, 5, 16]), pick.choice([1, 3]), pick.choice([1, 4, 8])

    def randn(*shape, factor=0.3):
        x = torch.randn(shape, generator=generator, dtype=torch.float64) * factor
        return x.to(dtype).requires_grad_()

    def maybe(*shape):
        return randn(*shape) if pick.random() < 0.5 else None

    def direction(reverse, conv_reverse=None):
        A = -3 * torch.rand(inner, states, generator=generator, dtype=torch.float64)
        return MixerDirection(
            randn(*pick.choice([(inner, taps), (inner, 1, taps)])),
            maybe(inner),
            randn(rank + 2 * states, inner),
            randn(inner, rank),
            randn(inner),
            A.to(dtype).requires_grad_(),
            maybe(inner),
            reverse,
            conv_reverse,
        )

    directions = [
        [direction(False)],
        [direction(True)],
        [direction(False), direction(True)],
        [direction(False), direction(True, conv_reverse=False)],
        [direction(True), direction(False)],
    ][fixed.get('kind', pick.randrange(5))]
    more = dict(
        norm_weight=maybe(dims),
        in_proj_bias=maybe(2 * inner),
        out_proj_bias=maybe(dims + 1),
        scale=pick.choice([1.0, 0.5]),
    )
    tokens = randn(batch, length, dims, factor=1.0)
    return tokens, (randn(2 * inner, dims), directions, randn(dims + 1, inner)), more


def tensors(tokens, arguments, more):
    """All that gradients are wanted of."""
    into, directions, out = arguments
    found = [tokens, into, out, *(x for direction in directions for x in direction), *more.values()]
    return [x for x in found if isinstance(x, torch.Tensor) and x.is_floating_point()]


def results(function, tokens, arguments, more, **options):
    """Output and all gradients."""
    out = function(tokens, *arguments, **more, **options)
    torch.manual_seed(0)
    return [out, *torch.autograd.grad(out, tensors(tokens, arguments, more), upstream(out))]


def assert_close(ours, theirs, tolerance):
    for index, (mine, yours) in enumerate(zip(ours, theirs, strict=True)):
        error = (mine - yours).norm() / yours.norm().clamp_min(1e-6)
        assert error < tolerance, f'result {index}: {error}'


@each_backend
@each_recompute
@pytest.mark.parametrize('seed', range(6))
def test_equals_the_specification(seed, recompute, backend):
    case = make_mixer(seed, length=random.Random(seed).choice([1, 2, 23]))
    options = dict(recompute=recompute, backend=backend)
    if backend in ('cuda', 'triton'):  # float32 and half precision only
        pytest.importorskip('triton')
        case = make_mixer(seed, length=9, dtype=torch.float32)
    tolerance = 1e-10 if case[0].dtype == torch.float64 else 1e-4
    assert_close(
        results(mamba_mixer, *case, **options), results(mamba_mixer_naive, *case), tolerance
    )


@each_backend
@each_recompute
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_vmap_has_gradients(dtype, recompute, backend):
    tokens, arguments, more = make_mixer(1, 6, dtype=dtype)
    tokens = torch.stack([tokens, -tokens]).detach().requires_grad_()

    def mix(tokens):
        return mamba_mixer(tokens, *arguments, **more, recompute=recompute, backend=backend)

    ours, theirs = torch.func.vmap(mix)(tokens), torch.stack([mix(one) for one in tokens])
    grad = torch.ones_like(theirs)
    given = tokens, arguments[0]
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert_close(
        [ours, *torch.autograd.grad(ours, given, grad)],
        [theirs, *torch.autograd.grad(theirs, given, grad)],
        tolerance,
    )


@needs_cpp
@pytest.mark.parametrize('recompute', ['activations', 'all'])
@pytest.mark.parametrize('kind', range(5))
@pytest.mark.parametrize(('length', 'batch'), [(1535, 1), (1536, 2), (3300, 1), (300, 5), (0, 2)])
def test_segments_and_groups_of_images_change_nothing(length, batch, kind, recompute):
    case = make_mixer(kind, length, batch=batch, kind=kind)
    composed = results(mamba_mixer, *case, recompute='none', backend='cpp')
    assert_close(results(mamba_mixer, *case, recompute=recompute, backend='cpp'), composed, 1e-10)


@needs_cpp
@pytest.mark.parametrize('recompute', ['activations', 'all'])
@pytest.mark.parametrize('seed', range(4))
def test_float32_gradients_equal_those_of_the_composition(seed, recompute):
    case = make_mixer(seed, 1700, dims=48, inner=96, dtype=torch.float32)
    composed = results(mamba_mixer, *case, recompute='none', backend='cpp')
    assert_close(results(mamba_mixer, *case, recompute=recompute, backend='cpp'), composed, 1e-5)


@pytest.mark.parametrize('length', [40, 2100])
def test_inference_equals_training(length):
    tokens, arguments, more = make_mixer(1, length, dtype=torch.float32)
    trained = mamba_mixer(tokens, *arguments, **more)
    with torch.no_grad():
        assert torch.allclose(mamba_mixer(tokens, *arguments, **more), trained, atol=1e-6)


@each_recompute
@pytest.mark.parametrize('seed', range(8))
def test_an_order_of_reading_is_a_permutation_around_the_scan(seed, recompute):
    tokens, (into, directions, out), more = make_mixer(seed, 15)
    generator = torch.Generator().manual_seed(seed)
    for k in range(len(directions)):
        if k != seed % 3:
            order = torch.randperm(15, generator=generator)
            directions[k] = directions[k]._replace(order=order)
    case = tokens, (into, directions, out), more
    ours = results(mamba_mixer, *case, recompute=recompute)
    assert_close(ours, results(mamba_mixer_naive, *case), 1e-10)


@needs_cpp
@pytest.mark.parametrize('recompute', ['activations', 'all'])
def test_directions_with_orders_are_mixed_by_the_operator(recompute):
    tokens, (into, directions, out), more = make_mixer(3, 15, kind=2)
    directions[1] = directions[1]._replace(order=torch.arange(15).flip(0))
    with Operators() as called:
        mamba_mixer(tokens, into, directions, out, **more, recompute=recompute)
    assert called.names.count('cpp_mamba_mixer.default') == 2
    assert not any('scan' in name for name in called.names)


def test_a_compiled_mixer_reads_in_an_order_whose_values_it_cannot_look_at():
    tokens, (into, directions, out), more = make_mixer(1, 15, kind=0)

    def mix(tokens, order):
        direction = MixerDirection(*directions[0][:9], order)
        return mamba_mixer(tokens, into, [direction], out, **more, backend='torch')

    compiled = torch.compile(mix, fullgraph=True, backend='eager')
    order = torch.arange(15).flip(0)
    torch.testing.assert_close(compiled(tokens, order), mix(tokens, order))


@pytest.mark.parametrize('backend', [b for b in CPU_BACKENDS if b in ('torch', 'cpp')])
def test_gradcheck(backend):
    tokens, arguments, more = make_mixer(2, 7, batch=1, dims=3, inner=4, kind=2)
    given = tensors(tokens, arguments, more)

    def run(*_):
        return mamba_mixer(tokens, *arguments, **more, backend=backend)

    assert torch.autograd.gradcheck(run, given)


@needs_cpp
@pytest.mark.parametrize('save', [0, 1, 2])
@pytest.mark.parametrize('kind', [0, 3])
def test_opcheck(kind, save):
    from mmvim_ops.backends.cpp import mixer
    from mmvim_ops.calls import MixerCall

    tokens, (into, directions, out), more = make_mixer(5, 13, kind=kind, dtype=torch.float32)
    call = MixerCall(
        *(tokens, more['norm_weight'], into, more['in_proj_bias'], out, more['out_proj_bias']),
        *(tuple(directions), 0.5, 1e-5, 'all'),
    )
    reverse = [flag for o in directions for flag in (int(o.reverse), int(o.reverse))]
    arguments = (*mixer._tensors(call), reverse, 0.5, 1e-5, save)
    if save == 0:
        arguments = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
    torch.library.opcheck(torch.ops.mmvim_ops.cpp_mamba_mixer, arguments)


@each_recompute
def test_compiles_into_one_graph(recompute):
    case = make_mixer(1, 30, kind=2, dtype=torch.float32)

    @torch.compile(fullgraph=True, backend='aot_eager')
    def run(*_):
        return mamba_mixer(case[0], *case[1], **case[2], recompute=recompute)

    expected = results(mamba_mixer, *case, recompute=recompute)
    assert_close(results(lambda *_, **__: run(), *case), expected, 1e-5)


def test_autocast_trains_in_half_precision():
    tokens, arguments, more = make_mixer(1, 30, kind=2, dtype=torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        out = mamba_mixer(tokens, *arguments, **more)
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out.float().sum(), tensors(tokens, arguments, more))
    exact = torch.autograd.grad(
        mamba_mixer(tokens, *arguments, **more).sum(), tensors(tokens, arguments, more)
    )
    assert_close(grads, exact, 0.1)


class Operators(TorchDispatchMode):
    """Names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(operator.__name__)
        return operator(*args, **kwargs or {})


@needs_cpp
@pytest.mark.parametrize('autocast', [True, False])
@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize(('length', 'batch'), [(1, 1), (37, 3), (1700, 1)])
def test_half_precision_is_one_operator_in_evaluation(length, batch, dtype, tolerance, autocast):
    kind = length % 5
    case = make_mixer(kind, length, batch=batch, dims=48, inner=72, dtype=torch.float32, kind=kind)
    with torch.no_grad(), Operators() as operators:
        exact = mamba_mixer(case[0], *case[1], **case[2], backend='cpp')
        if autocast:
            with torch.autocast('cpu', dtype):
                out = mamba_mixer(case[0], *case[1], **case[2], backend='cpp')
        else:
            tokens, (into, directions, outof), more = case
            halved = [MixerDirection(*map(half_of(dtype), o)) for o in directions]
            more = {name: half_of(dtype)(x) for name, x in more.items()}
            tokens, into, outof = map(half_of(dtype), (tokens, into, outof))
            out = mamba_mixer(tokens, into, halved, outof, **more, backend='cpp')
    assert out.dtype == dtype
    assert (out.float() - exact).norm() / exact.norm() < tolerance
    assert operators.names.count('cpp_mamba_mixer_half.default') == 1


def half_of(dtype):
    return lambda x: x.to(dtype) if isinstance(x, torch.Tensor) else x


@needs_cpp
def test_opcheck_in_half_precision():
    from mmvim_ops.backends.cpp import mixer
    from mmvim_ops.calls import MixerCall

    tokens, (into, directions, out), more = make_mixer(5, 13, kind=3, dtype=torch.float32)
    weights = more['norm_weight'], into, more['in_proj_bias'], out, more['out_proj_bias']
    call = MixerCall(tokens, *weights, tuple(directions), 0.5, 1e-5, 'all')
    given = [None if x is None else x.detach() for x in mixer._tensors(call)]
    arguments = (given[0].bfloat16(), *given[1:], [0, 0, 1, 0], 0.5, 1e-5, torch.bfloat16)
    torch.library.opcheck(torch.ops.mmvim_ops.cpp_mamba_mixer_half, arguments)


class Block(nn.Module):
    """A residual mixer with parameters of its own."""

    def __init__(self, seed):
        super().__init__()
        _, (into, directions, out), _ = make_mixer(seed, 4, dims=8, dtype=torch.float32, kind=0)
        self.into, self.out = nn.Parameter(into.detach()), nn.Parameter(out.detach()[:8])
        self.own = nn.ParameterList(x.detach() for x in directions[0][:7] if x is not None)
        self.given = [x is not None for x in directions[0][:7]]

    def forward(self, tokens, recompute):
        own = iter(self.own)
        direction = MixerDirection(*(next(own) if given else None for given in self.given))
        return tokens + mamba_mixer(tokens, self.into, [direction], self.out, recompute=recompute)


def saved_bytes(recompute):
    blocks = nn.ModuleList(Block(seed) for seed in range(3))
    parameters = {p.data_ptr() for p in blocks.parameters()}
    seen = {}

    def pack(x):
        seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    tokens = torch.randn(1, 2000, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        for block in blocks:
            tokens = block(tokens, recompute)
    return sum(size for pointer, size in seen.items() if pointer not in parameters)


@needs_cpp
def test_what_is_kept_for_backward_is_what_recompute_says():
    tokens, projected = 4 * 2000 * 8, 4 * 2000 * 40
    kept_all, kept, kept_none = (saved_bytes(r) for r in ('all', 'activations', 'none'))
    assert 3 * tokens <= kept_all < 3 * 2 * tokens
    assert 3 * projected <= kept - kept_all < 3 * 1.1 * projected
    assert kept_none > 2 * kept


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(recompute='some'), "recompute must be one of .*'some'"),
        (dict(tokens=torch.randn(3, 8)), 'tokens must have 3 dimensions'),
        (dict(tokens=torch.ones(1, 2, 8, dtype=torch.long)), 'tokens must be float'),
        (dict(into=torch.randn(41, 8)), 'in_proj_weight must have shape'),
        (dict(into=torch.randn(40, 7)), 'in_proj_weight must have shape'),
        (dict(out=torch.randn(9, 21)), 'out_proj_weight must have shape'),
        (dict(norm_weight=torch.randn(9)), 'norm_weight must have shape'),
        (dict(in_proj_bias=torch.randn(20)), 'in_proj_bias must have shape'),
        (dict(scale='x'), 'scale must be a number'),
        (dict(A=torch.randn(19, 1)), r'directions\[0\].A must have shape'),
        (dict(D=torch.randn(19)), r'directions\[0\].D must have shape'),
        (dict(conv_weight=torch.randn(19, 4)), r'directions\[0\].conv_weight must have shape'),
        (dict(x_proj_weight=torch.randn(4, 20)), r'directions\[0\].x_proj_weight must have shape'),
        (dict(order=[0, 1]), r'directions\[0\].order must be a tensor, got list'),
        (dict(order=torch.arange(4)), r'directions\[0\].order must be int64 of shape'),
        (dict(order=torch.tensor([0, 1, 2, 2, 4, 5])), r'0 to 5 once, and does not have 3'),
        (dict(order=torch.tensor([-1, 0, 1, 2, 3, 4])), r'0 to 5 once, and does not have 5'),
        (dict(order=torch.tensor([6, 1, 2, 3, 4, 5])), r'0 to 5 once, and does not have 0'),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    tokens, (into, directions, out), more = make_mixer(1, 6, dtype=torch.float32, kind=0)
    change = dict(change)
    tokens, into, out = (
        change.pop(name, x) for name, x in (('tokens', tokens), ('into', into), ('out', out))
    )
    own = {name: change.pop(name) for name in list(change) if name in MixerDirection._fields}
    directions = [directions[0]._replace(**own)]
    with pytest.raises((TypeError, ValueError), match=message):
        mamba_mixer(tokens, into, directions, out, **{**more, **change})
