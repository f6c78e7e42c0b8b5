"""Random arguments to what is public: the promised output, or an error that names an argument.

The default is a small, fixed selection. ``MMVIM_RANDOM_DRAWS=2000`` draws as many for every test,
new ones each time; what was found is kept as ``@example``.
"""

import os
import re

import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mmvim import SimpleFeaturePyramid, VisionMamba
from mmvim_ops import (
    Direction,
    bidirectional_selective_scan,
    causal_conv1d,
    scan_block_,
    selective_scan,
)

DRAWS = int(os.environ.get('MMVIM_RANDOM_DRAWS', 0))
draws = settings(
    max_examples=DRAWS or 25,
    derandomize=not DRAWS,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

integers = st.integers(-2, 9)
booleans = st.booleans()
nonsense = st.sampled_from([None, 'nonsense', -1, 0, 0.5, float('nan'), (), (3,), [1, 2, 3], True])


def mostly(usual: st.SearchStrategy, unusual: st.SearchStrategy = nonsense) -> st.SearchStrategy:
    """One draw in sixteen is nonsense, so that most calls get past the first check."""
    return st.integers(0, 15).flatmap(lambda n: unusual if n == 15 else usual)


def some(**arguments: st.SearchStrategy) -> st.SearchStrategy:
    """Keyword arguments, each of them given or left at its default."""
    return st.fixed_dictionaries({}, optional={k: mostly(v) for k, v in arguments.items()})


def refused(error: Exception, names) -> None:
    """The error names one of the arguments, as a word of its own."""
    assert any(re.search(rf'\b{re.escape(name)}\b', str(error)) for name in names), repr(error)


def finite(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        assert tensor.isfinite().all()


arch = st.fixed_dictionaries(
    dict(embed_dims=mostly(st.sampled_from([4, 6, 8])), depth=mostly(st.integers(1, 4))),
    optional=dict(
        d_state=mostly(st.integers(1, 5)),
        d_conv=mostly(st.integers(1, 5)),
        expand=mostly(st.integers(1, 3)),
    ),
)
backbone_arguments = some(
    img_size=st.one_of(st.integers(1, 40), st.tuples(st.integers(1, 40), st.integers(1, 40))),
    patch_size=st.integers(1, 16),
    stride=st.one_of(st.none(), st.integers(1, 16)),
    in_channels=st.integers(1, 5),
    directions=st.sampled_from(['ssm_conv', 'ssm', 'block', 'sequence', 'none', 'cross']),
    reduction=st.sampled_from(['mean', 'sum']),
    cls_token=st.sampled_from(['middle', 'head', 'double', None]),
    pos_embed=booleans,
    rope=booleans,
    rope_residual=booleans,
    rope_grid=st.one_of(st.none(), integers),
    norm=st.sampled_from(['rms', 'layer']),
    layer_scale=st.one_of(st.none(), st.floats(-1, 1)),
    drop_rate=st.floats(-0.5, 1.5),
    drop_path_rate=st.floats(-0.5, 1.5),
    out_type=st.sampled_from(['featmap', 'cls_token', 'avg_featmap', 'raw']),
    out_indices=st.one_of(integers, st.lists(integers, max_size=3)),
    feature_source=st.sampled_from(['residual', 'mixer']),
    final_norm=booleans,
    frozen_stages=integers,
    with_cp=booleans,
)
# rope_grid is derived from img_size and patch_size where it is not given.
NAMES = ['arch', 'embed_dims', 'depth', 'd_state', 'd_conv', 'expand', 'rope_grid']


@draws
@given(
    arch=mostly(arch),
    arguments=backbone_arguments,
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    training=booleans,
)
@example(
    arch=dict(embed_dims=4, depth=1),
    arguments=dict(rope=True, img_size=1),
    size=(7, 3),
    training=True,
)
def test_backbone(arch, arguments, size, training):
    torch.manual_seed(0)
    patch = arguments.get('patch_size', 16)
    stride = arguments.get('stride') or patch
    channels = arguments.get('in_channels', 3)
    try:
        model = VisionMamba(arch, **arguments).train(training)
        outputs = model(torch.rand(2, channels, *size))
    except (ValueError, TypeError) as error:
        refused(error, [*NAMES, *arguments])
        return
    grid = tuple(max(0, -((patch - side) // stride)) + 1 for side in size)
    dims = arch['embed_dims']
    extra = {'double': 2, None: 0}.get(arguments.get('cls_token', 'middle'), 1)
    shapes = dict(
        featmap=(2, dims, *grid),
        cls_token=(2, dims),
        avg_featmap=(2, dims),
        raw=(2, grid[0] * grid[1] + extra, dims),
    )
    indices = arguments.get('out_indices', -1)
    assert len(outputs) == (1 if isinstance(indices, int) else len(indices))
    for output in outputs:
        assert output.shape == shapes[arguments.get('out_type', 'featmap')]
    finite(*outputs)
    if training:
        sum(output.sum() for output in outputs if output.requires_grad).backward()
        finite(*(p.grad for p in model.parameters() if p.grad is not None))


scales = st.lists(st.sampled_from([4, 2, 1, 0.5]), min_size=1, max_size=4)


@draws
@given(
    widths=mostly(st.one_of(st.integers(1, 12), st.lists(st.integers(1, 12), max_size=4))),
    arguments=some(
        out_channels=st.one_of(st.none(), st.integers(1, 8)),
        scales=scales,
        num_outs=st.one_of(st.none(), st.integers(0, 6)),
    ),
    maps=st.integers(1, 4),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
)
@example(widths=8, arguments=dict(scales=0.5), maps=1, size=(8, 8))
@example(widths=8, arguments=dict(scales=float('nan')), maps=1, size=(8, 8))
@example(widths=8, arguments=dict(scales=(), num_outs=1), maps=1, size=(8, 8))
@example(widths=8, arguments={}, maps=1, size=(5, 1))
@example(widths=[8, 1, 1, 6], arguments=dict(out_channels=4), maps=4, size=(8, 11))
def test_neck(widths, arguments, maps, size):
    try:
        neck = SimpleFeaturePyramid(widths, **arguments)
        each = [widths] * maps if isinstance(widths, int) else widths
        outputs = neck([torch.rand(2, width, *size) for width in each])
    except (ValueError, TypeError) as error:
        # The number of maps is what out_indices of the backbone says.
        refused(error, ['in_channels', 'out_indices', 'scales', *arguments])
        return
    factors = arguments.get('scales', (4, 2, 1, 0.5))
    assert len(outputs) == (arguments.get('num_outs') or len(factors))
    for output, factor in zip(outputs, factors):  # noqa: B905  (further ones are subsampled)
        assert output.shape[2:] == tuple(max(int(side * factor), 1) for side in size)
        if arguments.get('out_channels'):
            assert output.shape[1] == arguments['out_channels']
    finite(*outputs)


SMALL = dict(
    u=torch.ones(1, 2, 3),
    delta=torch.ones(1, 2, 3),
    A=-torch.ones(2, 2),
    B=torch.ones(1, 2, 3),
    C=torch.ones(1, 2, 3),
)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
sides = st.integers(0, 5)


@st.composite
def scan_arguments(draw):
    """Tensors that fit, but for one in some draws."""
    batch, channels, states, length = draw(sides), draw(sides), draw(sides), draw(st.integers(0, 9))
    dtype = draw(dtypes)

    def tensor(*shape, of=None):
        return torch.rand(shape).to(of or dtype) - 0.5

    groups = draw(st.sampled_from([None, 1, 2]))

    def projection():
        kind = draw(st.integers(0, 2))
        if kind == 0:
            return tensor(channels, states, of=torch.float32)
        if kind == 1 or groups is None:
            return tensor(batch, states, length)
        return tensor(batch, groups, states, length)

    arguments = dict(
        u=tensor(batch, channels, length),
        delta=tensor(batch, channels, length),
        A=-tensor(channels, states, of=torch.float32).abs(),
        B=projection(),
        C=projection(),
    )
    optional = dict(
        D=tensor(channels, of=torch.float32),
        z=tensor(batch, channels, length),
        delta_bias=tensor(channels, of=torch.float32),
        delta_softplus=draw(booleans),
        return_last_state=draw(booleans),
        reverse=draw(booleans),
        backend=draw(st.sampled_from([None, 'torch', 'cpp'])),
    )
    arguments |= {name: value for name, value in optional.items() if draw(booleans)}
    if draw(st.integers(0, 3)) == 3:
        broken = draw(st.sampled_from(sorted(arguments)))
        wrong = st.one_of(nonsense, st.builds(lambda shape: tensor(*shape), st.lists(sides)))
        arguments[broken] = draw(wrong)
    return arguments


@draws
@given(scan_arguments())
@example({**SMALL, 'reverse': torch.rand(2)})
@example({**SMALL, 'backend': [1, 2, 3]})
def test_selective_scan(arguments):
    try:
        result = selective_scan(**arguments)
    except (ValueError, TypeError) as error:
        refused(error, arguments)
        return
    y, *state = result if arguments.get('return_last_state') else (result,)
    u, A = arguments['u'], arguments['A']
    assert y.shape == u.shape and y.dtype == u.dtype
    if state:
        assert state[0].shape == (u.shape[0], *A.shape)
    finite(y, *state)


DIRECTION = ('u', 'delta', 'A', 'B', 'C', 'D', 'delta_bias')


def direction(arguments: dict) -> Direction:
    """What of the arguments of a scan belongs to a direction."""
    return Direction(**{name: arguments[name] for name in DIRECTION if name in arguments})


@draws
@given(scan_arguments(), st.sampled_from([None, 'D', 'delta_bias']), st.floats(-2, 2))
def test_bidirectional_selective_scan(arguments, left_out, scale):
    both = {k: v for k, v in arguments.items() if k in ('z', 'delta_softplus', 'backend')}
    other = {name: value for name, value in arguments.items() if name != left_out}
    try:
        y = bidirectional_selective_scan(
            direction(arguments), direction(other), scale=scale, **both
        )
    except (ValueError, TypeError) as error:
        refused(error, [*arguments, 'forward', 'backward'])
        return
    assert y.shape == arguments['u'].shape and y.dtype == arguments['u'].dtype
    finite(y)


@draws
@given(scan_arguments(), booleans, st.floats(-2, 2), st.integers(0, 7))
def test_scan_block(arguments, accumulate, scale, wrong):
    names = ('z', 'delta_softplus', 'reverse', 'backend')
    rest = {name: arguments[name] for name in names if name in arguments}
    u, A = arguments['u'], arguments['A']
    out = state = torch.zeros(1)
    if isinstance(u, torch.Tensor) and isinstance(A, torch.Tensor) and u.ndim and A.ndim:
        out = torch.zeros_like(u)
        wide = torch.float64 if u.dtype == torch.float64 else torch.float32
        state = torch.zeros(len(u), *A.shape, dtype=wide)
    if wrong == 6:
        out = out[..., 1:]
    if wrong == 7:
        state = state[..., 1:]
    try:
        scan_block_(out, state, direction(arguments), accumulate=accumulate, scale=scale, **rest)
    except (ValueError, TypeError) as error:
        refused(error, [*arguments, 'out', 'state', 'direction'])
        return
    finite(out, state)


@st.composite
def convolution_arguments(draw):
    batch, channels, length = draw(sides), draw(sides), draw(st.integers(0, 9))
    dtype = draw(dtypes)
    arguments = dict(
        x=torch.rand(batch, channels, length).to(dtype),
        weight=torch.rand(channels, draw(st.integers(0, 6))).to(dtype),
    )
    optional = dict(
        bias=torch.rand(channels).to(dtype),
        activation=draw(st.sampled_from([None, 'silu', 'swish'])),
        reverse=draw(booleans),
        backend=draw(st.sampled_from([None, 'torch', 'cpp'])),
    )
    arguments |= {name: value for name, value in optional.items() if draw(booleans)}
    if draw(st.integers(0, 3)) == 3:
        broken = draw(st.sampled_from(sorted(arguments)))
        arguments[broken] = draw(
            st.one_of(nonsense, st.builds(lambda shape: torch.rand(shape), st.lists(sides)))
        )
    return arguments


@draws
@given(convolution_arguments())
def test_causal_conv1d(arguments):
    try:
        y = causal_conv1d(**arguments)
    except (ValueError, TypeError) as error:
        refused(error, arguments)
        return
    assert y.shape == arguments['x'].shape and y.dtype == arguments['x'].dtype
    finite(y)
