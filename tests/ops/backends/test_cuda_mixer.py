"""The mixer of backend 'cuda': equal to its specification, few launches, nothing out of date.

In the emulation; see conftest.py.
"""

import pytest
import torch
from scan_cases import CPU_BACKENDS
from test_mamba_mixer import assert_close, make_mixer, results, tensors, upstream
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mmvim_ops import mamba_mixer
from mmvim_ops.backends.cuda import conv1d, mixer, scan
from mmvim_ops.naive import mamba_mixer_naive

pytestmark = pytest.mark.skipif('cuda' not in CPU_BACKENDS, reason='the kernels are not emulated')
each_recompute = pytest.mark.parametrize('recompute', ['activations', 'all', 'none'])
KINDS = {'both': 2, 'shared_conv_direction': 3}


def make(seed=1, length=70, kind='both', dtype=torch.float32, **sizes):
    return make_mixer(seed, length, kind=KINDS[kind], dtype=dtype, **sizes)


def ours(*case, **options):
    tokens, arguments, more = case
    return mamba_mixer(tokens, *arguments, **more, **options, backend='cuda')


@pytest.fixture
def calls(monkeypatch):
    """Names of the kernels that were called."""
    found = []
    for module in (scan, conv1d):

        def call(function, *arguments, original=module.call):
            found.append(function)
            original(function, *arguments)

        monkeypatch.setattr(module, 'call', call)
    return found


@pytest.fixture
def fused(monkeypatch):
    """How often this path computed a call."""
    found = []
    original = mixer.mamba_mixer
    monkeypatch.setattr(mixer, 'mamba_mixer', lambda call: found.append(1) or original(call))
    return found


@each_recompute
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(('seed', 'length'), [(0, 1), (1, 70), (2, 200), (7, 64)])
def test_equals_the_specification(seed, length, kind, recompute, fused):
    case = make(seed, length, kind)
    mine = results(mamba_mixer, *case, recompute=recompute, backend='cuda')
    assert_close(mine, results(mamba_mixer_naive, *case), 1e-4)
    assert fused
    with torch.no_grad():
        assert torch.equal(ours(*case), mine[0])


def in_dtype(case, dtype):
    tokens, (into, directions, out), more = case

    def to(x):
        return x.detach().to(dtype).requires_grad_() if isinstance(x, torch.Tensor) else x

    directions = [type(d)(*map(to, d)) for d in directions]
    more = {name: to(x) for name, x in more.items()}
    return to(tokens), (to(into), directions, to(out)), more


@each_recompute
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(dtype, recompute, fused):
    case = in_dtype(make(3), dtype)
    mine = results(mamba_mixer, *case, recompute=recompute, backend='cuda')
    exact = results(mamba_mixer_naive, *in_dtype(case, torch.float64))
    assert fused
    assert all(x.dtype == dtype for x in mine)
    assert_close([x.double() for x in mine], exact, 4e-2 if dtype == torch.bfloat16 else 5e-3)


@each_recompute
@pytest.mark.parametrize('where', ['inside', 'outside'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_autocast(dtype, where, recompute, fused):
    """As in the composition, whether or not backward is called under autocast, too."""
    case = in_dtype(make(4), dtype)

    def train(backend):
        with torch.autocast('cpu', torch.bfloat16):
            out = mamba_mixer(case[0], *case[1], **case[2], recompute=recompute, backend=backend)
            grad = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
            if where == 'inside':
                return out, *torch.autograd.grad(out, tensors(*case), grad)
        return out, *torch.autograd.grad(out, tensors(*case), grad)

    mine, composed = train('cuda'), train('torch')
    assert len(fused) == 1
    for x, y in zip(mine, composed, strict=True):
        assert x.dtype == y.dtype
    exact = in_dtype(case, torch.float64)
    out = mamba_mixer_naive(exact[0], *exact[1], **exact[2])
    grad = torch.linspace(-1, 1, out.numel()).view(out.shape).to(torch.bfloat16).double()
    exact = out, *torch.autograd.grad(out, tensors(*exact), grad)
    assert_close([x.double() for x in mine], exact, 4e-2)


def test_backward_is_not_cast_where_forward_was_not():
    case = make(4)
    expected = results(mamba_mixer, *case, backend='cuda')
    out = ours(*case)
    torch.manual_seed(0)
    grad = upstream(out)
    with torch.autocast('cpu', torch.bfloat16):
        grads = torch.autograd.grad(out, tensors(*case), grad)
    for x, y in zip(grads, expected[1:], strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize('states', [17, 64])
def test_many_states(states, fused):
    tokens, (into, directions, out), more = make(5, 70)
    inner, rank = directions[0].dt_proj_weight.shape
    directions = [
        d._replace(
            A=-torch.rand(inner, states).requires_grad_(),
            x_proj_weight=(torch.randn(rank + 2 * states, inner) * 0.1).requires_grad_(),
        )
        for d in directions
    ]
    case = tokens, (into, directions, out), more
    mine = results(mamba_mixer, *case, backend='cuda')
    assert_close(mine, results(mamba_mixer_naive, *case), 1e-4)
    assert fused


@pytest.mark.parametrize('layout', ['length_first', 'reversed', 'expanded', 'sliced'])
def test_tokens_of_any_layout(layout, fused):
    tokens, arguments, more = with_norm(make(2, 23))

    def lay_out(x):
        if layout == 'length_first':
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == 'expanded':
            return x[:1].expand(3, -1, -1)
        if layout == 'sliced':
            return x[:, 1:, :]
        return x.flip(1)

    def run(function, **options):
        out = function(lay_out(tokens), *arguments, **more, **options)
        torch.manual_seed(0)
        grad = upstream(out).transpose(0, 1).contiguous().transpose(0, 1)
        return [out, *torch.autograd.grad(out, tensors(tokens, arguments, more), grad)]

    assert_close(run(mamba_mixer, backend='cuda'), run(mamba_mixer_naive), 1e-4)
    assert fused


def test_inference_mode(fused):
    case = make(2)
    with torch.inference_mode():
        out = ours(*case)
    assert torch.equal(out, ours(*case))
    assert len(fused) == 2


# What a call costs.

NO_LAUNCH = {
    *('empty', 'empty_like', 'empty_strided', 'new_empty', 'detach', 'requires_grad_'),
    *('view', 'reshape', 'transpose', 'mT', 'numpy_T', 'as_strided', 'slice', 'narrow', 'flatten'),
    *('split', 'split_with_sizes', 'unbind', 'select', 'unsqueeze', 'squeeze', 'alias', 'chunk'),
    *('lift_fresh', 'is_leaf', '_unsafe_view', 'view_as'),
}


def launches(function, calls):
    """Operations that compute: torch's, and kernels of this library."""
    function()
    calls.clear()
    with torch.autograd.profiler.profile() as profile:
        function()

    def inside(event):
        return event is not None and (event.name.startswith('aten::') or inside(event.cpu_parent))

    found = [
        event.name.removeprefix('aten::')
        for event in profile.function_events
        if event.name.startswith('aten::') and not inside(event.cpu_parent)
    ]
    return [name for name in found if name not in NO_LAUNCH] + calls


def with_norm(case, dtype=torch.float32):
    tokens, arguments, more = case
    more = dict(more, norm_weight=torch.ones(tokens.shape[2], dtype=dtype, requires_grad=True))
    return tokens, arguments, more


@pytest.mark.parametrize('autocast', [True, False])
def test_launches_of_inference(autocast, calls):
    case = with_norm(make(1))

    @torch.no_grad()
    def infer():
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            ours(*case)

    found = launches(infer, calls)
    expected = ['rms_norm', '_foreach_copy_', 'linear', 'bmm', 'bmm', 'linear']
    expected += ['mmvim_conv_forward', 'mmvim_scan_forward']
    assert found == expected
    assert len(found) == 8


@pytest.mark.parametrize(('recompute', 'most'), [('activations', 19), ('all', 21), ('none', 16)])
def test_launches_of_backward(recompute, most, calls):
    """Without the norm, whose gradient is torch's: one operation on a GPU, many on the CPU."""
    tokens, arguments, _ = make(1)
    case = tokens, arguments, {}
    with torch.autocast('cpu', torch.bfloat16):
        out = ours(*case, recompute=recompute)
    grad = torch.ones_like(out)

    def differentiate():
        torch.autograd.grad(out, tensors(*case), grad, retain_graph=True)

    found = launches(differentiate, calls)
    assert found.count('mmvim_scan_forward') == (recompute == 'all')
    assert found.count('mmvim_conv_forward') == (0 if recompute == 'none' else 1)
    assert len(found) <= most, found


def test_what_is_kept():
    tokens, arguments, more = make(1, 2000, batch=1, dims=8, inner=20)
    own = {x.untyped_storage().data_ptr() for x in tensors(tokens, arguments, more)}
    states = arguments[1][0].A.shape[1]

    def kept(recompute):
        seen = {}

        def pack(x):
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            ours(tokens, arguments, more, recompute=recompute)
        return sum(size for pointer, size in seen.items() if pointer not in own)

    checkpoints = 2 * 4 * states * 20 * scan.saved_states(2000)
    assert kept('all') == 0  # but the tokens
    assert kept('activations') == 4 * 2000 * 3 * 20 + checkpoints
    assert kept('none') > 2 * kept('activations')


# Weights that change.


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.case = make(1)
        into, directions, out = self.case[1]  # without the biases, which do not change
        parameters = [into, out, *(x for d in directions for x in d[:7] if x is not None)]
        self.own = nn.ParameterList(x.detach().clone() for x in parameters)

    def run(self, function, **options):
        into, out, *rest = self.own
        rest = iter(rest)
        directions = [
            d._replace(
                **{name: next(rest) for name in d._fields[:7] if getattr(d, name) is not None}
            )
            for d in self.case[1][1]
        ]
        return function(self.case[0], into, directions, out, **options)


def edit_in_place(module):
    for p in module.own:
        p.mul_(0.5)


def edit_data(module):
    for p in module.own:
        p.data.mul_(0.5)


def assign_data(module):
    for p in module.own:
        p.data = p.data * 0.5


def load(module):
    module.load_state_dict({name: x * 0.5 for name, x in module.state_dict().items()})


def load_by_assignment(module):
    module.load_state_dict({name: x * 0.5 for name, x in module.state_dict().items()}, assign=True)


def replace(module):
    """The old ones are freed, and the new ones may lie at their addresses."""
    for i in range(len(module.own)):
        half = (module.own[i].detach() * 0.5).tolist()
        module.own[i] = nn.Parameter(torch.empty(0))
        module.own[i] = nn.Parameter(torch.tensor(half))


@pytest.mark.parametrize('autocast', [True, False])
@pytest.mark.parametrize(
    'change', [edit_in_place, edit_data, assign_data, load, load_by_assignment, replace]
)
@torch.no_grad()
def test_weights_that_change_are_seen_by_the_next_call(change, autocast, fused):
    module = Mixer().eval()

    def run():
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            return module.run(mamba_mixer, backend='cuda').float()

    tolerance = 4e-2 if autocast else 1e-4
    for _ in range(2):
        assert_close([run()], [module.run(mamba_mixer_naive)], tolerance)
    before = run()
    change(module)
    assert_close([run()], [module.run(mamba_mixer_naive)], tolerance)
    assert (run() - before).norm() > 0.3 * before.norm()
    assert fused


@each_recompute
def test_a_weight_edited_between_forward_and_backward_is_an_error(recompute):
    case = make(1)
    out = ours(*case, recompute=recompute)
    with torch.no_grad():
        case[1][0].mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        out.sum().backward()


# What torch asks of an operation.


def test_only_what_is_needed_gets_a_gradient(calls):
    tokens, arguments, more = with_norm(make(1))
    given = tensors(tokens, arguments, more)
    _, *grads = results(mamba_mixer, tokens, arguments, more, backend='cuda')
    every = dict(zip(map(id, given), grads, strict=True))
    for wanted in given:
        for x in given:
            x.requires_grad_(x is wanted)
        out = ours(tokens, arguments, more)
        torch.manual_seed(0)
        out.backward(upstream(out))
        assert torch.equal(wanted.grad, every[id(wanted)])
        assert all(x.grad is None for x in given if x is not wanted)
        wanted.grad = None


@each_recompute
def test_under_checkpointing(recompute):
    case = make(1)

    def run(tokens, *arguments, **more):
        return checkpoint(
            lambda x: ours(x, arguments, more, recompute=recompute), tokens, use_reentrant=False
        )

    expected = results(mamba_mixer, *case, recompute=recompute, backend='cuda')
    for x, y in zip(results(run, *case), expected, strict=True):
        assert torch.equal(x, y)


def test_second_derivatives_are_refused():
    tokens, arguments, more = make(1)
    (grad,) = torch.autograd.grad(ours(tokens, arguments, more).sum(), tokens, create_graph=True)
    with pytest.raises(RuntimeError, match='second derivatives'):
        torch.autograd.grad(grad.sum(), tokens)


def test_function_transforms_are_refused(fused):
    tokens, arguments, more = make(1)
    with pytest.raises(RuntimeError, match='functorch'):
        torch.func.grad(lambda x: ours(x, arguments, more, recompute='none').sum())(tokens)
    assert not fused


def test_modes_see_the_single_operations(fused):
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Mode():
        ours(*make(1))
    assert 'mmvim_ops.cuda_bidirectional_scan.default' in seen
    assert not fused


def test_compiles_into_one_graph(fused):
    case = make(1, 30)
    run = torch.compile(ours, fullgraph=True, backend='aot_eager')
    expected = ours(*case)
    assert len(fused) == 1
    assert_close([run(*case)], [expected], 1e-5)
    assert len(fused) == 1


def reversed_directions(case):
    tokens, (into, directions, out), more = case
    return tokens, (into, directions[::-1], out), more


def with_order(case):
    tokens, (into, directions, out), more = case
    directions = [directions[0], directions[1]._replace(order=torch.randperm(tokens.shape[1]))]
    return tokens, (into, directions, out), more


def one_direction(case):
    tokens, (into, directions, out), more = case
    return tokens, (into, directions[:1], out), more


def other_ranks(case):
    tokens, (into, directions, out), more = case
    rank, first = directions[0].dt_proj_weight.shape[1], directions[0]
    directions[0] = first._replace(
        x_proj_weight=torch.cat([first.x_proj_weight[:1], first.x_proj_weight]).detach(),
        dt_proj_weight=torch.randn(first.dt_proj_weight.shape[0], rank + 1),
    )
    return tokens, (into, directions, out), more


def other_taps(case):
    tokens, (into, directions, out), more = case
    weight = directions[0].conv_weight.detach()
    directions[0] = directions[0]._replace(conv_weight=torch.cat([weight, weight], dim=-1))
    return tokens, (into, directions, out), more


@pytest.mark.parametrize(
    'change', [reversed_directions, with_order, one_direction, other_ranks, other_taps]
)
def test_other_mixers_are_composed(change, fused):
    case = change(make(1))
    with torch.no_grad():
        assert_close([ours(*case)], [mamba_mixer_naive(case[0], *case[1], **case[2])], 1e-4)
    assert not fused


@pytest.mark.parametrize(('batch', 'length'), [(0, 5), (2, 0)])
def test_nothing_to_compute(batch, length):
    case = make(1, length, batch=batch)
    out = ours(*case)
    assert out.shape == (batch, length, 9)
    assert all(not x.any() for x in torch.autograd.grad(out.sum(), tensors(*case)))
