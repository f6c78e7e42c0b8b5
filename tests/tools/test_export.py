"""``tools/export.py``, called from a folder of the user's."""

import pytest
from command_line import passed, refused, tool
from tiny_models import SEGMENTOR, write_checkpoint, write_config

from mmvim_ops.onnxruntime import LIBRARY

TOOL = 'export.py'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('home') / 'my models'
    folder.mkdir()
    write_checkpoint(folder / 'seg.pth', write_config(folder / 'seg.py', SEGMENTOR))
    return folder


@pytest.mark.slow
def test_a_segmentor_is_written_and_verified(folder):
    arguments = ['--format', 'torch-export', '--shape', 64, 72, '--verify']
    output = passed(tool(TOOL, 'seg.py', 'seg.pth', *arguments, cwd=folder))
    assert 'wrote seg.pt2' in output and 'images (1 x 3 x 64 x 72) to logits, labels' in output
    assert '1 x 3 x 64 x 72: labels: 0.000% differ' in output
    assert (folder / 'seg.pt2').stat().st_size > 0


@pytest.mark.slow
def test_onnx_is_written_and_verified(folder):
    for package in ('onnxscript', 'onnxruntime'):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[onnx]'")
    arguments = ['--format', 'onnx', '--shape', 64, '--dynamic', '--verify', '--batch-size', 3]
    output = passed(tool(TOOL, 'seg.py', 'seg.pth', *arguments, cwd=folder))
    assert 'wrote seg.onnx' in output and 'images (any size) to logits, labels' in output
    assert '3 x 3 x 64 x 64: labels: 0.000% differ' in output


@pytest.mark.slow
@pytest.mark.skipif(not LIBRARY.exists(), reason='the library for ONNX Runtime is not compiled')
def test_custom_operators_are_written_and_verified(folder):
    for package in ('onnxscript', 'onnxruntime'):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[onnx]'")
    arguments = ['own.onnx', '--format', 'onnx', '--custom-op', '--shape', 64, '--verify']
    output = passed(tool(TOOL, 'seg.py', 'seg.pth', *arguments, cwd=folder))
    assert 'wrote own.onnx' in output and '1 x 3 x 64 x 64: labels: 0.000% differ' in output


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--format', 'coreml'], '--format: invalid choice'),
        (['--format', 'onnx', '--shape', 1, 2, 3], '--shape takes one or two positive numbers'),
        (['--format', 'onnx', '--batch-size', 0], '--batch-size must be positive, got 0'),
        (['--format', 'aoti', '--custom-op'], '--custom-op is for --format onnx, got aoti'),
        (['x.onnx', '--format', 'aoti'], 'OUT must end in .pt2 for aoti'),
        (['gone/x.pt2', '--format', 'aoti'], 'OUT must be a file in a folder that is'),
    ],
)
def test_what_is_refused(arguments, message, folder):
    assert message in refused(tool(TOOL, 'seg.py', 'seg.pth', *arguments, cwd=folder))
