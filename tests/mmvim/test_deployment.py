"""Exported models compute what the models do, for sizes that the export has not seen."""

import copy
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import DETECTOR, SEGMENTOR, write_checkpoint, write_config
from torch import nn
from torch.export import Dim
from torch.fx.experimental import symbolic_shapes

from mmvim.apis import load_model
from mmvim.datasets.samples import generate_batch
from mmvim.deployment import FORMATS, export, load, part_of
from mmvim.deployment.parts import PoolByProducts
from mmvim.models import DeiT, SimpleFeaturePyramid, VisionMamba
from mmvim.models.mamba_mixer import MambaMixer
from mmvim.utils.errors import UserError
from mmvim_ops.backends.cpp import library as cpp
from mmvim_ops.onnxruntime import LIBRARY

pytestmark = pytest.mark.skipif(
    not hasattr(symbolic_shapes, 'guard_or_false'),
    reason='sizes stay variables in exports from torch 2.7 on',
)
ARCH = dict(embed_dims=32, depth=2)
VARIANTS = {
    'plain': dict(),
    'class token': dict(out_type='cls_token'),
    'ssm': dict(directions='ssm', cls_token='head', norm='layer'),
    'block': dict(directions='block', stride=8, remainder='resize'),
    'cross': dict(directions='cross', cls_token='double', rope=True, rope_residual=True),
    'none': dict(directions='none', cls_token=None, remainder='resize', layer_scale=0.5),
}
UNSEEN = [(1, 3, 67, 101), (3, 3, 64, 64)]


def pictures(*shape: int) -> torch.Tensor:
    return 255 * torch.rand(shape, generator=torch.Generator().manual_seed(0))


def build(text: str, folder) -> nn.Module:
    config = write_config(folder / 'config.py', text)
    return load_model(config, write_checkpoint(folder / 'weights.pth', config), device='cpu')


@pytest.fixture(scope='module')
def segmentor(tmp_path_factory) -> nn.Module:
    return build(SEGMENTOR, tmp_path_factory.mktemp('segmentor'))


def assert_same(outputs, expected, tolerance: float = 1e-4) -> None:
    """Up to a part of the largest value; labels may not differ."""
    for theirs, ours in zip(outputs, expected, strict=True):
        assert theirs.shape == ours.shape
        if ours.is_floating_point():
            limit = tolerance * ours.abs().max().item()
            torch.testing.assert_close(theirs, ours, rtol=0, atol=limit)
        else:
            assert torch.equal(theirs, ours)


@pytest.mark.parametrize('strict', [False, True])
@pytest.mark.parametrize('variant', ['plain', 'cross'])
def test_torch_export_with_any_size(variant, strict):
    model = VisionMamba(ARCH, img_size=64, **VARIANTS[variant]).eval()
    sizes = {0: Dim('batch', max=99), 2: Dim('height', min=32), 3: Dim('width', min=32)}
    with torch.no_grad():
        program = torch.export.export(
            model, (torch.rand(2, 3, 80, 96),), dynamic_shapes=(sizes,), strict=strict
        )
        run = program.module()
        for shape in UNSEEN:
            x = torch.rand(shape)
            assert_same(run(x), model(x), 1e-5)


@pytest.mark.skipif(cpp.MISSING is not None, reason='the cpp backend is not compiled')
@pytest.mark.parametrize('strict', [False, True])
def test_torch_export_calls_the_whole_mixer(strict):
    model = VisionMamba(ARCH, img_size=64).eval()

    class Alias(nn.Module):
        """Reaches the model by two names, for which torch.export puts proxies of modules in."""

        def __init__(self):
            super().__init__()
            self.model = self.extract = model

        def forward(self, x):
            return self.extract(x)

    for module in (model, Alias()):
        with torch.no_grad():
            program = torch.export.export(module, (torch.rand(1, 3, 64, 64),), strict=strict)
        called = [str(node.target) for node in program.graph.nodes]
        assert called.count('mmvim_ops.cpp_mamba_mixer.default') == 2


class Graphs(list):
    """A backend of torch.compile that keeps the graphs and runs them as they are."""

    def __call__(self, graph, _):
        self.append(graph)
        return graph.forward

    def compile(self, function):
        torch._dynamo.reset()
        return torch.compile(function, backend=self, fullgraph=True, dynamic=True)


def backbone_and_pyramid() -> nn.Module:
    model = nn.Sequential(
        VisionMamba(ARCH, img_size=64, out_indices=(0, 1), remainder='resize'),
        SimpleFeaturePyramid(32, scales=(1, 0.5)),
    )
    for module in model.modules():
        if hasattr(module, 'align_to_picture'):  # as in segmentors
            module.align_to_picture()
    return model


def test_torch_compile_has_one_graph_for_all_sizes():
    """Of the backbone and pyramid, which is called with sizes that are and are not a multiple of
    the patches'."""
    model, graphs = backbone_and_pyramid().eval(), Graphs()
    compiled = graphs.compile(model)
    with torch.no_grad():
        for shape in [(2, 3, 80, 96), *UNSEEN[1:], (5, 3, 133, 97)]:
            x = torch.rand(shape)
            assert_same(compiled(x), model(x), 1e-5)
    assert len(graphs) == 1


def gradients(model: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    given = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, given, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(given, found, strict=True)]


@pytest.mark.parametrize('recompute', ['activations', 'all', 'none'])
def test_torch_compile_has_one_graph_in_training(recompute):
    model, graphs = backbone_and_pyramid().train(), Graphs()
    for module in model.modules():
        if isinstance(module, MambaMixer):
            module.recompute = recompute
    compiled = graphs.compile(model)
    for shape in [(2, 3, 80, 96), *UNSEEN[1:], (5, 3, 133, 97)]:
        x = torch.rand(shape)
        ours, theirs = (
            gradients(model, sum(y.square().mean() for y in f(x))) for f in (model, compiled)
        )
        assert_same(theirs, ours)
    assert len(graphs) == 1


def test_torch_compile_of_a_segmentor_has_one_graph_for_all_sizes(segmentor):
    part, graphs = part_of(segmentor), Graphs()
    compiled = graphs.compile(part)
    with torch.no_grad():
        for shape in [(2, 3, 80, 96), *UNSEEN[1:], (5, 3, 133, 97)]:
            x = pictures(*shape)
            assert_same(compiled(x), part(x))
    assert len(graphs) == 1


def test_torch_compile_of_a_segmentors_loss_has_one_graph(segmentor):
    """mmseg's accuracy selects pixels, of which torch breaks the graph unless it is told not to."""
    model, graphs = copy.deepcopy(segmentor).train(), Graphs()
    for module in model.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()  # the second call sees the same statistics

    def loss(batch):
        return model.parse_losses(model(**batch, mode='loss'))[0]

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = graphs.compile(loss)
        for size in (128, 96):
            model.data_preprocessor.size = (size, size)
            batch = model.data_preprocessor(generate_batch('mmseg', 2, size), True)
            expected = loss(batch)
            torch.testing.assert_close(compiled(batch), expected)
    assert len(graphs) == 1


@pytest.mark.parametrize('side', [1, 2, 3, 4, 5, 8, 11])
def test_pooling_in_exports_is_that_of_models(side):
    x = torch.randn(2, 3, side, side + 3)
    for size in ((1, 2), (3, 3), (6, 6)):
        expected = nn.AdaptiveAvgPool2d(size)(x)
        torch.testing.assert_close(PoolByProducts(size)(x), expected)


def test_a_segmentor_runs_in_a_process_of_its_own(segmentor, tmp_path):
    part = part_of(segmentor)
    export(part, tmp_path / 'model.pt2', 'torch-export', (64, 64), dynamic=True)
    x = pictures(*UNSEEN[0])
    torch.save(x, tmp_path / 'x.pt')
    program = (
        'import torch, mmvim_ops\n'
        "model = torch.export.load('model.pt2').module()\n"
        "torch.save(model(torch.load('x.pt')), 'y.pt')\n"
    )
    subprocess.run([sys.executable, '-c', program], cwd=tmp_path, check=True)
    assert_same(torch.load(tmp_path / 'y.pt'), part(x))


def test_logits_are_those_of_the_segmentor(segmentor):
    x = pictures(2, 3, 64, 64)
    logits, labels = part_of(segmentor)(x)
    bgr = [image.flip(0) for image in x]
    samples = segmentor.test_step(dict(inputs=bgr, data_samples=None))
    assert_same([logits], [torch.stack([sample.seg_logits.data for sample in samples])])
    assert_same([labels], [torch.cat([sample.pred_sem_seg.data for sample in samples])])


def test_the_model_itself_is_not_changed(segmentor):
    before = {name: type(module) for name, module in segmentor.named_modules()}
    part_of(segmentor).of_operations()
    assert {name: type(module) for name, module in segmentor.named_modules()} == before


def test_unknown_arguments_are_refused(segmentor, tmp_path):
    with pytest.raises(ValueError, match=r"part must be one of model, backbone, got 'head'"):
        part_of(segmentor, 'head')
    with pytest.raises(ValueError, match=r"file_format must be one of .*, got 'coreml'"):
        export(part_of(segmentor), tmp_path / 'x', 'coreml', (64, 64))
    with pytest.raises(ValueError, match=r"custom_op is for file_format 'onnx', got 'aoti'"):
        export(part_of(segmentor), tmp_path / 'x', 'aoti', (64, 64), custom_op=True)


def test_a_missing_package_is_named(segmentor, tmp_path, monkeypatch):
    monkeypatch.setattr('mmvim.deployment.files.find_spec', lambda name: None)
    with pytest.raises(UserError, match=r'needs onnx and onnxscript: pip install'):
        export(part_of(segmentor), tmp_path / 'x.onnx', 'onnx', (64, 64))


# ONNX: about ten seconds each.


def exported_to_onnx(part, path, dynamic: bool = True, **arguments):
    for package in ('onnxscript', 'onnxruntime'):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[onnx]'")
    onnx = pytest.importorskip('onnx')
    export(part, path, 'onnx', (64, 64), dynamic=dynamic, **arguments)
    content = onnx.load(path)
    used = {node.domain for node in content.graph.node}
    assert used == ({'', 'mmvim_ops'} if arguments.get('custom_op') else {''})
    assert {entry.domain for entry in content.opset_import} == used
    assert not content.functions  # nothing but ONNX's own operators, and those asked for
    return load(path, 'onnx', **arguments)


class Holder(nn.Module):
    """A backbone as segmentors hold it."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.data_preprocessor = backbone.eval(), None


@pytest.mark.slow
@pytest.mark.parametrize('variant', VARIANTS)
def test_onnx_of_every_direction(variant, tmp_path):
    torch.manual_seed(0)
    # A backend that the model insists on does not stop the export.
    backbone = VisionMamba(ARCH, img_size=64, backend='torch', **VARIANTS[variant])
    part = part_of(Holder(backbone), 'backbone')
    run = exported_to_onnx(part, tmp_path / 'model.onnx')
    for shape in UNSEEN:
        x = pictures(*shape) / 255
        assert_same(run(x), part(x))


needs_library = pytest.mark.skipif(
    not LIBRARY.exists(), reason='the library for ONNX Runtime is not compiled'
)


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize('variant', VARIANTS)
def test_onnx_with_custom_operators(variant, tmp_path):
    torch.manual_seed(0)
    backbone = VisionMamba(ARCH, img_size=64, recompute='all', **VARIANTS[variant])
    part = part_of(Holder(backbone), 'backbone')
    run = exported_to_onnx(part, tmp_path / 'model.onnx', custom_op=True)
    for shape in UNSEEN:
        x = pictures(*shape) / 255
        assert_same(run(x), part(x))


def test_a_missing_library_is_named(segmentor, tmp_path, monkeypatch):
    pytest.importorskip('onnxscript', reason="onnxscript is not installed: pip install '.[onnx]'")
    monkeypatch.setattr('mmvim_ops.onnxruntime.LIBRARY', tmp_path / 'no.so')
    with pytest.raises(UserError, match='library for ONNX Runtime is not compiled'):
        export(part_of(segmentor), tmp_path / 'x.onnx', 'onnx', (64, 64), custom_op=True)


@pytest.mark.slow
def test_onnx_of_deit(tmp_path):
    torch.manual_seed(0)
    part = part_of(Holder(DeiT(dict(embed_dims=32, depth=2, num_heads=2), img_size=64)), 'backbone')
    run = exported_to_onnx(part, tmp_path / 'model.onnx')
    x = pictures(*UNSEEN[0]) / 255
    assert_same(run(x), part(x))


@pytest.mark.slow
@pytest.mark.parametrize('dynamic', [False, True])
def test_onnx_of_a_segmentor(segmentor, dynamic, tmp_path):
    part = part_of(segmentor)
    run = exported_to_onnx(part, tmp_path / 'model.onnx', dynamic)
    for shape in UNSEEN if dynamic else [(1, 3, 64, 64)]:
        assert_same(run(pictures(*shape)), part(pictures(*shape)))


@pytest.mark.slow
def test_onnx_of_a_detector(tmp_path):
    part = part_of(build(DETECTOR, tmp_path))
    assert part.names == ('feature0', 'feature1', 'feature2')
    run = exported_to_onnx(part, tmp_path / 'model.onnx')
    assert_same(run(pictures(*UNSEEN[0])), part(pictures(*UNSEEN[0])))


@pytest.mark.slow
def test_aot_inductor_of_a_backbone_in_a_new_process(segmentor, tmp_path):
    """Sides are multiples of the stride, as docs/deployment.md says."""
    part = part_of(segmentor, 'backbone')
    export(part, tmp_path / 'model.pt2', 'aoti', (64, 64), dynamic=True)
    cases = [pictures(1, 3, 96, 64), pictures(3, 3, 64, 128)]
    torch.save(cases, tmp_path / 'cases.pt')
    program = (
        'import torch, mmvim_ops\n'
        "model = torch._inductor.aoti_load_package('model.pt2')\n"
        "torch.save([list(model(x)) for x in torch.load('cases.pt')], 'outputs.pt')\n"
    )
    subprocess.run([sys.executable, '-c', program], cwd=tmp_path, check=True)
    for outputs, case in zip(torch.load(tmp_path / 'outputs.pt'), cases, strict=True):
        assert_same(outputs, part(case))


@pytest.mark.slow
@pytest.mark.skipif(cpp.MISSING is not None, reason='the cpp backend is not compiled')
@pytest.mark.skipif(shutil.which('g++') is None, reason='there is no g++')
def test_aot_inductor_in_a_program_without_python(segmentor, tmp_path):
    """The program and the command that compiles it are those of docs/deployment.md."""
    part = part_of(segmentor)
    export(part, tmp_path / 'model.pt2', 'aoti', (512, 512))
    page = (Path(__file__).parents[2] / 'docs/deployment.md').read_text('utf-8')
    (program,) = re.findall(r'^```cpp\n(.*?)^```', page, re.DOTALL | re.MULTILINE)
    (command,) = re.findall(r'^(g\+\+ (?:.*\\\n)*.*)$', page, re.MULTILINE)
    assert 'Python' not in program and '1, 3, 512, 512' in program
    (tmp_path / 'run.cpp').write_text(program)
    folder = Path(torch.__file__).parent
    subprocess.run(f'TORCH={folder}; {command}', shell=True, cwd=tmp_path, check=True)
    x = pictures(1, 3, 512, 512)
    x.numpy().tofile(tmp_path / 'images.bin')
    run = ['./run', str(cpp.LIBRARY), 'model.pt2', 'images.bin', 'logits.bin']
    subprocess.run(run, cwd=tmp_path, check=True, env={})
    expected = part(x)[0]
    logits = torch.from_numpy(np.fromfile(tmp_path / 'logits.bin', np.float32))
    assert_same([logits.view_as(expected)], [expected])


def test_formats_have_ends_of_names():
    assert set(FORMATS.values()) == {'.onnx', '.pt2'}
