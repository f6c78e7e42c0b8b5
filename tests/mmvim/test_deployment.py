"""Exported models compute what the models do, for sizes that the export has not seen."""

import subprocess
import sys

import pytest
import torch
from tiny_models import DETECTOR, SEGMENTOR, write_checkpoint, write_config
from torch import nn
from torch.export import Dim
from torch.fx.experimental import symbolic_shapes

from mmvim.apis import load_model
from mmvim.deployment import FORMATS, export, load, part_of
from mmvim.deployment.parts import PoolByProducts
from mmvim.models import DeiT, SimpleFeaturePyramid, VisionMamba
from mmvim.utils.errors import UserError

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
        ).module()
        for shape in UNSEEN:
            x = torch.rand(shape)
            assert_same(program(x), model(x), 1e-5)


def test_torch_compile_has_one_graph_for_all_sizes():
    """Of the backbone and pyramid, which is called with sizes that are and are not a multiple of
    the patches'."""
    model = nn.Sequential(
        VisionMamba(ARCH, img_size=64, out_indices=(0, 1), remainder='resize'),
        SimpleFeaturePyramid(32, scales=(1, 0.5)),
    ).eval()
    for module in model.modules():
        if hasattr(module, 'align_to_picture'):  # as in segmentors
            module.align_to_picture()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for shape in [(2, 3, 80, 96), *UNSEEN[1:], (5, 3, 133, 97)]:
            x = torch.rand(shape)
            assert_same(compiled(x), model(x), 1e-5)
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
    part_of(segmentor).without_kernels()
    assert {name: type(module) for name, module in segmentor.named_modules()} == before


def test_unknown_arguments_are_refused(segmentor, tmp_path):
    with pytest.raises(ValueError, match=r"part must be one of model, backbone, got 'head'"):
        part_of(segmentor, 'head')
    with pytest.raises(ValueError, match=r"file_format must be one of .*, got 'coreml'"):
        export(part_of(segmentor), tmp_path / 'x', 'coreml', (64, 64))


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
    assert {entry.domain for entry in content.opset_import} == {''}
    assert not content.functions  # nothing but ONNX's own operators
    return load(path, 'onnx')


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
    """Sides are multiples of the stride, as docs/export.md says."""
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


def test_formats_have_ends_of_names():
    assert set(FORMATS.values()) == {'.onnx', '.pt2'}
