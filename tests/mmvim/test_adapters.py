"""Whatever is put in place of a layer, around it or on it counts, in training and in evaluation."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

from mmvim import VisionMamba
from mmvim.models import mamba_mixer
from mmvim.models.directions import DIRECTIONS
from mmvim.models.vision_mamba import VimBlock

LAYERS = ('in_proj', 'conv1d', 'x_proj', 'dt_proj', 'conv1d_b', 'x_proj_b', 'dt_proj_b', 'out_proj')
# A layer that is called multiplies by another kernel in training than in evaluation.
TRAINED = dict(rtol=1e-5, atol=5e-6)
LINEAR = tuple(name for name in LAYERS if not name.startswith('conv1d'))


def small(**args) -> VisionMamba:
    torch.manual_seed(0)
    arch = dict(embed_dims=16, depth=2, d_state=4)
    model = VisionMamba(**{'arch': arch, 'img_size': 32, 'patch_size': 8, **args})
    for name, parameter in model.named_parameters():
        if 'proj' in name and name.endswith('weight'):
            parameter.data *= 3  # so that every layer matters
    return model


def image(batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, 24, 40, generator=torch.Generator().manual_seed(1))


def evaluated(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(image())[0].clone()


def loss(features: tuple[torch.Tensor]) -> torch.Tensor:
    (out,) = features
    return (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()


class Lora(nn.Module):
    """A low-rank addition to a linear layer, as adapters make it."""

    def __init__(self, base_layer: nn.Module, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Linear(base_layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base_layer.out_features, bias=False)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


@pytest.fixture
def op_calls(monkeypatch) -> list:
    """Calls of the fused op."""
    calls = []

    def recorded(*args, **kwargs):
        calls.append(kwargs)
        return original(*args, **kwargs)

    original = mamba_mixer.mamba_mixer
    monkeypatch.setattr(mamba_mixer, 'mamba_mixer', recorded)
    return calls


def test_untouched_layers_go_to_the_fused_op(op_calls):
    evaluated(small(recompute='all', backend='torch'))
    assert [(c['recompute'], c['backend']) for c in op_calls] == [('all', 'torch')] * 2


@pytest.mark.parametrize('directions', DIRECTIONS)
def test_calls_of_layers_give_the_numbers_of_the_fused_op(directions, op_calls):
    model = small(directions=directions)
    fused = evaluated(model)
    torch.manual_seed(1)
    loss(model.train()(image())).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    op_calls.clear()
    for block in model.layers:
        for layer in block.mixer.children():
            layer.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(evaluated(model), fused, rtol=1e-5, atol=1e-6)
    torch.manual_seed(1)
    loss(model.train()(image())).backward()
    for name, parameter in model.named_parameters():
        error = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert error < 1e-4, name
    assert op_calls == []


@pytest.mark.parametrize('name', LINEAR)
def test_adapters_have_the_same_effect_in_evaluation_as_in_training(name):
    model = small()
    plain = evaluated(model)
    for block in model.layers:
        setattr(block.mixer, name, Lora(getattr(block.mixer, name)))
    trained = model.train()(image())[0]
    assert not torch.allclose(trained, plain, atol=1e-5)
    torch.testing.assert_close(evaluated(model), trained.detach(), rtol=1e-5, atol=1e-6)
    loss((trained,)).backward()
    for block in model.layers:
        lora = getattr(block.mixer, name)
        assert lora.up.weight.grad.abs().sum() > 0 and lora.down.weight.grad.abs().sum() > 0


@pytest.mark.parametrize('name', LAYERS)
@pytest.mark.parametrize('norm', [weight_norm, parametrizations.weight_norm])
def test_weight_norm_counts(norm, name):
    model = small()
    plain = evaluated(model)
    for block in model.layers:
        layer = norm(getattr(block.mixer, name))
        torch.testing.assert_close(evaluated(model), plain, rtol=1e-5, atol=1e-6)
        magnitudes = next(p for p in layer.parameters() if p.shape[1:].numel() == 1 and p.ndim > 1)
        magnitudes.data *= 2
        doubled = model.train()(image())[0].detach()
        assert not torch.allclose(doubled, plain, atol=1e-5)
        torch.testing.assert_close(evaluated(model), doubled, **TRAINED)
        magnitudes.data /= 2


@pytest.mark.parametrize('name', LAYERS)
def test_pruned_weights_are_zero(name):
    model = small()
    for block in model.layers:
        prune.random_unstructured(getattr(block.mixer, name), 'weight', amount=0.5)
    pruned = evaluated(model)
    torch.testing.assert_close(model.train()(image())[0].detach(), pruned, rtol=1e-5, atol=1e-6)
    for block in model.layers:
        prune.remove(getattr(block.mixer, name), 'weight')
    torch.testing.assert_close(evaluated(model), pruned, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('train', [True, False])
def test_hooks_fire_on_every_level_and_keep_what_they_saw(train):
    model, seen = small().train(train), []

    def hook(module, inputs, output):
        output = output[0] if isinstance(output, tuple) else output
        seen.append((output, output.detach().clone()))

    mixer = model.layers[0].mixer
    watched = [
        *model.layers,
        *(model.layers[1].norm, mixer, model.norm_f),
        *(getattr(mixer, name) for name in LAYERS),
    ]
    for module in watched:
        module.register_forward_hook(hook)
    with torch.set_grad_enabled(train):
        model(image())
    assert len(seen) == len(watched)
    assert all(torch.equal(output, copied) for output, copied in seen)


@pytest.mark.parametrize('level', ['in_proj', 'dt_proj_b', 'norm', 'mixer', 'block', 'everywhere'])
def test_hooks_change_outputs_and_inputs_and_see_gradients(level):
    model = small()
    block = model.layers[1]
    module = {'norm': block.norm, 'mixer': block.mixer, 'block': block}.get(level)
    if module is None and level != 'everywhere':
        module = getattr(block.mixer, level)
    calls = []

    def before(called, inputs):
        if level != 'everywhere' or called is block.mixer.in_proj:
            calls.append('before')
            return (inputs[0] * 2 + 0.1, *inputs[1:])

    def backward(called, grad_inputs, grad_outputs):
        if level != 'everywhere' or called is block.mixer.in_proj:
            calls.append('backward')

    plain = evaluated(model)
    if level == 'everywhere':
        hooks = [
            nn.modules.module.register_module_forward_pre_hook(before),
            nn.modules.module.register_module_full_backward_hook(backward),
        ]
    else:
        hooks = [
            module.register_forward_pre_hook(before),
            module.register_full_backward_hook(backward),
        ]
    try:
        changed = model.train()(image())[0]
        changed.sum().backward()
        torch.testing.assert_close(evaluated(model), changed.detach(), **TRAINED)
    finally:
        for hook in hooks:
            hook.remove()
    assert not torch.allclose(changed, plain, atol=1e-5)
    assert calls == ['before', 'backward', 'before']
    assert torch.equal(evaluated(model), plain)


def test_a_forward_of_its_own_is_called():
    model = small()
    layer = model.layers[0].mixer.x_proj_b
    layer.forward = lambda x: 2 * nn.functional.linear(x, layer.weight)
    doubled = evaluated(model)
    del layer.forward
    layer.weight.data *= 2
    torch.testing.assert_close(evaluated(model), doubled, rtol=1e-5, atol=1e-6)


def test_quantized_layers_are_called():
    model = small()
    exact = evaluated(model)
    mixer = model.layers[0].mixer
    mixer.in_proj = nn.Sequential(nn.Linear(16, 64, bias=False))
    mixer.in_proj[0].weight = small().layers[0].mixer.in_proj.weight
    quantized = torch.ao.quantization.quantize_dynamic(model.eval(), {nn.Linear}, torch.qint8)
    assert type(quantized.layers[0].mixer.in_proj[0]) is not nn.Linear
    out = evaluated(quantized)
    assert not torch.equal(out, exact)
    assert (out - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize('norm', [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize('mixer', [nn.Linear, nn.Identity])
def test_a_block_takes_any_mixer_and_norm(mixer, norm):
    model = small()
    model.layers[0].norm = norm(16)
    model.layers[1] = VimBlock(mixer(16, 16), norm(16))
    trained = model.train()(image())[0]
    trained.sum().backward()
    torch.testing.assert_close(evaluated(model), trained.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('directions', DIRECTIONS)
def test_copies_are_the_same_model(directions):
    model = small(directions=directions, rope=True)
    expected = evaluated(model)
    assert torch.equal(evaluated(copy.deepcopy(model)), expected)
    assert torch.equal(evaluated(pickle.loads(pickle.dumps(model))), expected)


@pytest.mark.parametrize('directions', DIRECTIONS)
@pytest.mark.parametrize('train', [True, False])
def test_an_empty_batch_gives_an_empty_map(directions, train):
    model = small(directions=directions).train(train)
    with torch.set_grad_enabled(train):
        out = model(image(0))[0]
    assert out.shape == (0, 16, 3, 5)
    if train:
        out.sum().backward()
        assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize('directions', DIRECTIONS)
def test_double_precision(directions):
    model = small(directions=directions, rope=True)
    single = evaluated(model)
    (out,) = model.double()(image().double())
    assert out.dtype == torch.float64
    torch.testing.assert_close(out.float(), single, rtol=1e-4, atol=1e-5)
    model.layers[0].mixer.out_proj.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(model(image().double())[0], out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('directions', DIRECTIONS)
def test_shapes_alone_are_enough(directions):
    with torch.device('meta'):
        model = small(directions=directions, rope=True, drop_path_rate=0.1)
        out = model(torch.rand(2, 3, 24, 40))[0]
    assert (out.device.type, out.shape) == ('meta', (2, 16, 3, 5))


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning', 'ignore:.*torch.jit.trace')
@pytest.mark.parametrize('directions', DIRECTIONS)
def test_traces(directions):
    model = small(directions=directions).eval()
    traced = torch.jit.trace(model, image())  # compares itself with the model
    torch.testing.assert_close(traced(image())[0], model(image())[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('args', [{}, dict(directions='cross', with_cp=True)])
def test_exports_whole(args):
    model = small(**args).eval()
    exported = torch.export.export(model, (image(),), strict=True).module()
    torch.testing.assert_close(exported(image())[0], model(image())[0], rtol=1e-5, atol=1e-6)


SLOWLY = [dict(directions=name) for name in ('none', 'ssm', 'block', 'cross')] + [
    dict(with_cp=True)
]


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize(
    'args',
    [{}, *(pytest.param(args, marks=pytest.mark.slow) for args in SLOWLY)],
)
def test_compiles_to_one_graph(args, train):
    torch.compiler.reset()
    model = small(**args).train(train)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    with torch.set_grad_enabled(train):
        out = compiled(image())[0]
    if train:
        loss((out,)).backward()
        grads = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        loss(model(image())).backward()
        for grad, parameter in zip(grads, model.parameters(), strict=True):
            assert (grad - parameter.grad).norm() < 1e-4 * parameter.grad.norm()
    torch.testing.assert_close(out.detach(), evaluated(model), rtol=1e-5, atol=1e-6)


def test_compiled_models_call_adapters():
    torch.compiler.reset()
    model = small()
    model.layers[0].mixer.dt_proj = Lora(model.layers[0].mixer.dt_proj)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(evaluated(compiled), evaluated(model), rtol=1e-5, atol=1e-6)
