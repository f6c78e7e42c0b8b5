"""get_flops.py on configs of this project, and what it says of those that do not build."""

import re
import runpy

import pytest
import torch
from command_line import ROOT, passed, refused, tool

from mmvim.models import VisionMamba
from mmvim.utils.flops import count_flops

TOOL = 'analysis_tools/get_flops.py'
SEGMENTOR = 'configs/vim/vim-demo_upernet_shapes-128x128.py'
DETECTOR = 'configs/vim/vim-demo_cascade-mask-rcnn_shapes-128x128.py'


def rows(output: str) -> dict[str, list[float]]:
    """Parameters (M), GFLOPs and GMACs of each line of the table; None for what is not run."""
    found = re.findall(r'^ *(\w+) +(\S+) +(\S+) +(\S+) +\S+$', output, re.MULTILINE)
    return {
        name: [None if cell == '-' else float(cell) for cell in cells]
        for name, *cells in found
        if re.match(r'[\d.]+$', cells[0])
    }


def test_a_segmentor_by_parts():
    options = ['model.backbone.arch.depth=4', 'model.backbone.out_indices=0,1,2,3']
    output = passed(tool(TOOL, SEGMENTOR, '--shape', 64, '--cfg-options', *options))
    assert 'shapes-128x128: 64 x 64\n' in output
    parts = rows(output)
    assert list(parts) == ['backbone', 'neck', 'decode_head', 'auxiliary_head', 'total']
    assert parts['auxiliary_head'][1] is None  # in training only
    for column, rounding in ((0, 2e-3), (1, 2e-4), (2, 2e-4)):
        counted = [part[column] for name, part in parts.items() if name != 'total']
        assert sum(filter(None, counted)) == pytest.approx(parts['total'][column], abs=rounding)
    assert parts['total'][1] == pytest.approx(2 * parts['total'][2], abs=2e-4)
    backbone = VisionMamba(dict(embed_dims=96, depth=4), patch_size=8, cls_token=None).eval()
    with torch.no_grad():
        expected = count_flops(lambda: backbone(torch.randn(1, 3, 64, 64)))
    assert parts['backbone'][1] == pytest.approx(expected / 1e9, abs=1e-4)


@pytest.mark.slow
def test_a_detector_is_counted_at_the_proposals_and_detections_it_may_have():
    def heads(proposals, detections):
        limits = {'rpn': proposals, 'rcnn': detections}
        settings = [f'model.test_cfg.{name}.max_per_img={n}' for name, n in limits.items()]
        arguments = ['--shape', 60, 64, '--depth', 2, '--cfg-options', *settings]
        output = passed(tool(TOOL, DETECTOR, *arguments))
        assert (
            f'60 x 64, padded to 64 x 64, {proposals} proposals, {detections} detections' in output
        )
        return rows(output)

    few, many = heads(4, 1), heads(8, 3)
    assert {'backbone', 'neck', 'rpn_head', 'roi_head', 'rpn_conv', 'total'} <= few.keys()
    for part, growth in (('backbone', 1), ('rpn_head', 1), ('bbox_head', 2), ('mask_head', 3)):
        assert many[part][1] == pytest.approx(growth * few[part][1], rel=1e-2), part
    assert few['roi_head'][1] == pytest.approx(few['bbox_head'][1] + few['mask_head'][1], abs=2e-4)


def test_a_model_that_cannot_be_built_is_named():
    message = refused(tool(TOOL, SEGMENTOR, '--cfg-options', 'model.backbone.arch=huge'))
    assert f'the model of {SEGMENTOR} cannot be built: ValueError: arch must be one of' in message


@pytest.mark.parametrize('shape', [['64', '64', '3'], ['0'], ['64', '-1']])
def test_shape_is_one_or_two_positive_numbers(monkeypatch, capsys, shape):
    parse_args = runpy.run_path(str(ROOT / 'tools' / TOOL))['parse_args']
    monkeypatch.setattr('sys.argv', ['get_flops.py', SEGMENTOR, '--shape', *shape])
    with pytest.raises(SystemExit):
        parse_args()
    numbers = ', '.join(shape)
    assert f'takes one or two positive numbers, got [{numbers}]' in capsys.readouterr().err
