"""The operators behave as PyTorch's own: traced, compiled, used in workers, refused second
derivatives."""

from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.utils.checkpoint
from scan_cases import CPU_BACKENDS, TENSORS, assert_same, make_arguments, run

from mmvim_ops import (
    Direction,
    MixerDirection,
    bidirectional_selective_scan,
    causal_conv1d,
    mamba_mixer,
    scan_segment_,
    selective_scan,
)
from mmvim_ops.naive import selective_scan_naive

ops = torch.ops.mmvim_ops
each_backend = pytest.mark.parametrize('backend', CPU_BACKENDS)
needs_cpp = pytest.mark.skipif('cpp' not in CPU_BACKENDS, reason='the cpp backend is not compiled')


def leaves(arguments):
    return [
        None if x is None else x.requires_grad_() for x in (arguments[name] for name in TENSORS)
    ]


@pytest.mark.parametrize('groups', [0, None, 3])
def test_opcheck_of_the_torch_operator(groups):
    x = make_arguments(groups_B=3, groups_C=groups or None)
    torch.library.opcheck(ops.torch_scan.default, leaves(x)[:5])


@needs_cpp
@pytest.mark.parametrize(
    'case',
    [
        dict(length=400, groups_B=0, groups_C=0, channels_last=True),
        dict(groups_B=None, groups_C=3),
        dict(skip=False, gate=False, bias=False, softplus=False),
        dict(dtype=torch.bfloat16),
    ],
)
def test_opcheck_of_the_cpp_scan(case):
    arguments = leaves(make_arguments(**case))
    torch.library.opcheck(ops.cpp_scan.default, (*arguments, True, False, True))
    with torch.no_grad():
        torch.library.opcheck(ops.cpp_scan.default, (*arguments, False, True, False))


@needs_cpp
@pytest.mark.parametrize('gate', [True, False])
def test_opcheck_of_the_cpp_bidirectional_scan(gate):
    directions = []
    for seed, groups in ((0, 0), (1, None)):
        u, delta, A, B, C, D, z, bias = leaves(
            make_arguments(
                length=200, groups_B=groups, groups_C=0, channels_last=gate, skip=gate, seed=seed
            )
        )
        directions += [u, delta, A, B, C, D, bias]
    torch.library.opcheck(
        ops.cpp_bidirectional_scan.default, (*directions, z if gate else None, True, 0.5, True)
    )


@needs_cpp
@pytest.mark.parametrize('bias', [True, False])
def test_opcheck_of_the_cpp_conv1d(bias):
    x, weight = torch.randn(2, 9, 20).transpose(1, 2).requires_grad_(), torch.randn(20, 4)
    torch.library.opcheck(
        ops.cpp_conv1d.default,
        (
            x,
            weight.requires_grad_(),
            torch.randn(20).requires_grad_() if bias else None,
            True,
            bias,
        ),
    )


@pytest.mark.parametrize(
    'backend, compiler',
    [
        *((name, 'aot_eager') for name in CPU_BACKENDS),
        pytest.param('cpp', 'inductor', marks=[needs_cpp, pytest.mark.slow]),
    ],
)
def test_compiles_into_one_graph(backend, compiler):
    def block(x, weight, A, z, B):
        u = causal_conv1d(x, weight, backend=backend)
        y, state = selective_scan(
            u,
            u,
            A,
            B,
            B,
            delta_softplus=True,
            return_last_state=True,
            reverse=True,
            backend=backend,
        )
        direction = Direction(y, u, A, B, B)
        out = bidirectional_selective_scan(
            direction, direction, z, True, scale=0.5, backend=backend
        )
        return out.sum() + state.sum()

    x, weight, z = torch.randn(2, 30, 6).transpose(1, 2), torch.randn(6, 4), torch.randn(2, 6, 30)
    arguments = [
        t.requires_grad_() for t in (x, weight, -torch.rand(6, 4), z, torch.randn(2, 4, 30))
    ]
    compiled = torch.compile(block, fullgraph=True, backend=compiler)
    expected = torch.autograd.grad(block(*arguments), arguments)
    actual = torch.autograd.grad(compiled(*arguments), arguments)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@each_backend
def test_works_under_autocast_inference_mode_and_deterministic_mode(backend):
    arguments = make_arguments(length=50, states=16)
    expected = selective_scan(**arguments, backend=backend)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert_same(
            run(selective_scan, arguments, backend=backend),
            run(selective_scan_naive, arguments),
            2e-5,
        )
    with torch.inference_mode():
        torch.testing.assert_close(selective_scan(**arguments, backend=backend), expected)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (run(selective_scan, arguments, backend=backend) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@each_backend
def test_vmap_has_gradients(backend):
    """Of tensors that only say what they wrap when vmap is over."""
    arguments = make_arguments(length=20)
    u, weight = torch.randn(3, *arguments['u'].shape), torch.randn(3, arguments['u'].shape[1], 4)

    def block(u, weight):
        u = causal_conv1d(u, weight, backend=backend)
        return selective_scan(**{**arguments, 'u': u}, backend=backend)

    inputs = u.requires_grad_(), weight.requires_grad_()
    expected = torch.stack([block(*pair) for pair in zip(*inputs, strict=True)])
    actual = torch.func.vmap(block)(*inputs)
    torch.testing.assert_close(actual, expected)
    upstream = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(actual, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@each_backend
def test_backward_can_run_twice(backend):
    arguments = make_arguments(length=300)
    inputs = [x for x in leaves(arguments) if x is not None]
    out = selective_scan(**arguments, backend=backend).sum()
    first = torch.autograd.grad(out, inputs, retain_graph=True)
    second = torch.autograd.grad(out, inputs)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


class NoGradient(torch.autograd.Function):
    """Passes its input on, and no gradient back."""

    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@each_backend
def test_outputs_whose_gradient_is_not_there(backend):
    arguments = make_arguments(length=100)
    inputs = leaves(arguments)
    names = dict(zip(TENSORS, inputs, strict=True))

    def gradients(function, **more):
        out, last_state = function(**names, delta_softplus=True, return_last_state=True, **more)
        of_state = torch.autograd.grad(
            last_state.square().sum(), inputs, retain_graph=True, materialize_grads=True
        )
        of_out = torch.autograd.grad(out.square().sum(), inputs)
        return [*of_state, *of_out]

    actual = gradients(selective_scan, backend=backend)
    for ours, theirs in zip(actual, gradients(selective_scan_naive), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    # Not even that of the only output.
    x, weight, tokens = inputs[0], torch.randn(6, 4), torch.randn(2, 5, 20)
    direction = Direction(*(names[name] for name in Direction._fields))
    mixed = mix(tokens.requires_grad_(), backend=backend)
    for out in (
        causal_conv1d(x, weight, backend=backend),
        bidirectional_selective_scan(direction, direction, backend=backend),
        mixed,
    ):
        of = tokens if out is mixed else x
        (grad,) = torch.autograd.grad(NoGradient.apply(out).sum(), of, allow_unused=True)
        assert grad is None or not grad.any()


@each_backend
def test_dynamo_does_not_look_into_an_operator(backend, recwarn):
    """Where what it compiles calls a function that it leaves alone."""
    inputs = leaves(make_arguments())
    graphs = []

    def compile_graph(graph, example_inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == 'call_function'])
        return graph.forward

    @torch.compiler.disable(recursive=False)
    def left_alone(*tensors):
        operator = getattr(ops, f'{backend}_scan')
        return operator(*tensors[: 5 if backend == 'torch' else None], *flags)[0]

    flags = () if backend == 'torch' else (True, False, True)

    @torch.compile(backend=compile_graph)
    def function(u, *others):
        return left_alone(u * 2, *others) + 1

    function(*inputs).sum().backward()
    assert [len(graph) for graph in graphs] == [1, 1]
    assert not [w for w in recwarn if 'Dynamo' in str(w.message)]


@each_backend
def test_second_derivatives_are_refused(backend):
    arguments = make_arguments()
    arguments['u'].requires_grad_()
    out = selective_scan(**arguments, backend=backend)
    (grad,) = torch.autograd.grad(out.square().sum(), arguments['u'], create_graph=True)
    with pytest.raises(RuntimeError, match='no second derivatives'):
        torch.autograd.grad(grad.sum(), arguments['u'])


ARGUMENTS = make_arguments()
DIRECTION = Direction(*(ARGUMENTS[name] for name in Direction._fields))


def scan_segment(u, **more):
    out, state = torch.zeros(2, 6, 20), torch.zeros(2, 6, 4)
    scan_segment_(out, state, DIRECTION._replace(u=u), **more)
    return out


def mix(u, **more):
    """With ``u`` as the tokens."""
    shapes = (3, 4), (3,), (2 + 2 * 5, 3), (3, 2), (3,), (3, 5)
    direction = MixerDirection(*map(torch.ones, shapes))
    return mamba_mixer(u, torch.ones(6, 20), [direction], torch.ones(20, 3), **more)


FUNCTIONS = {
    'selective_scan': lambda u, **more: selective_scan(u, *list(ARGUMENTS.values())[1:8], **more),
    'bidirectional_selective_scan': lambda u, **more: bidirectional_selective_scan(
        DIRECTION._replace(u=u), DIRECTION, **more
    ),
    'scan_segment_': scan_segment,
    'causal_conv1d': lambda u, **more: causal_conv1d(u, torch.ones(6, 4), **more),
    'mamba_mixer': mix,
}


@each_backend
@pytest.mark.parametrize('name', FUNCTIONS)
def test_forward_mode_is_refused(name, backend):
    """torch takes the derivative of an operator without a formula for zero."""
    u = ARGUMENTS['u']
    function = partial(FUNCTIONS[name], backend=backend)

    def refused():
        return pytest.raises(NotImplementedError, match=f'{name} has no forward-mode derivatives')

    with refused():
        torch.func.jvp(function, (u,), (torch.ones_like(u),))
    with refused():
        torch.func.jacfwd(function)(u)
    with forward_ad.dual_level():
        with refused():
            function(forward_ad.make_dual(u, torch.ones_like(u)))
        function(u)  # without a tangent it is computed as always


@pytest.mark.parametrize('name', ['A', 'B', 'D', 'z', 'delta_bias'])
def test_forward_mode_of_any_argument_is_refused(name):
    arguments = make_arguments()

    def function(x):
        return selective_scan(**{**arguments, name: x})

    x = arguments[name]
    with pytest.raises(NotImplementedError, match='forward-mode'):
        torch.func.jvp(function, (x,), (torch.ones_like(x),))


def test_a_compiled_forward_mode_derivative_is_refused():
    arguments = make_arguments()

    @torch.compile(backend='eager')
    def derivative(u):
        def function(u):
            return selective_scan(**{**arguments, 'u': u})

        return torch.func.jvp(function, (u,), (torch.ones_like(u),))[1]

    with pytest.raises(Exception, match='forward-mode'):
        derivative(arguments['u'])


class Scans(torch.utils.data.Dataset):
    """Each item is the sum of a scan."""

    def __init__(self, backend):
        self.backend = backend

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return selective_scan(**make_arguments(length=100, seed=i), backend=self.backend).sum()


@each_backend
def test_works_in_a_forked_loader_worker(backend):
    scans = Scans(backend)
    expected = torch.stack([scans[i] for i in range(4)])  # starts the threads of this process
    loader = torch.utils.data.DataLoader(
        scans, num_workers=2, timeout=60, multiprocessing_context='fork'
    )
    torch.testing.assert_close(torch.cat(list(loader)), expected)


@each_backend
def test_activations_can_be_recomputed(backend):
    """Under checkpointing, saved tensors can be read only once."""

    def block(u, delta, A, B, C, D, z, bias):
        u = causal_conv1d(u, A[:, :2], bias, backend=backend)
        y = selective_scan(u, delta, A, B, C, D, z, bias, True, backend=backend)
        direction = Direction(y, delta, A, B, C, D, bias)
        return bidirectional_selective_scan(direction, direction, z, True, backend=backend)

    inputs = leaves(make_arguments())
    stored = torch.autograd.grad(block(*inputs).sum(), inputs)
    out = torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False)
    for ours, expected in zip(torch.autograd.grad(out.sum(), inputs), stored, strict=True):
        assert torch.equal(ours, expected)
