"""The converter changes names and nothing else, and never leaves half a file or replaces one."""

import contextlib
import io
import runpy
import subprocess
from pathlib import Path
from unittest import mock

import hostile
import pytest
import torch
from command_line import ROOT

from mmvim import VisionMamba

SCRIPT = str(ROOT / 'tools/model_converters/vim_to_mmvim.py')


@pytest.fixture(autouse=True)
def undone(guard) -> None:
    """The converter decides for its process whether code from checkpoints runs."""


def convert(*arguments) -> subprocess.CompletedProcess:
    """The command line, without the seconds that a process of its own takes to import torch."""
    stdout, stderr = io.StringIO(), ''
    with mock.patch('sys.argv', [SCRIPT, *map(str, arguments)]), contextlib.redirect_stdout(stdout):
        try:
            runpy.run_path(SCRIPT, run_name='__main__')
        except SystemExit as end:
            stderr = str(end.code)
    return subprocess.CompletedProcess(arguments, int(stderr != ''), stdout.getvalue(), stderr)


@pytest.fixture(scope='module')
def official(tmp_path_factory) -> Path:
    """A classifier in official format, with rotary tables and entries of several types."""
    torch.manual_seed(0)
    weights = VisionMamba(dict(embed_dims=16, depth=2), img_size=56, patch_size=4).state_dict()
    weights |= {'head.weight': torch.rand(10, 16), 'head.bias': torch.rand(10).half()}
    weights |= {'rope.freqs_cos': torch.rand(196, 16), 'rope.freqs_sin': torch.rand(196, 16)}
    path = tmp_path_factory.mktemp('official') / 'vim.pth'
    torch.save({'model': weights}, path)
    return path


@pytest.fixture(scope='module')
def converted(official) -> Path:
    path = official.with_name('mmvim.pth')
    result = convert(official, path)
    assert result.returncode == 0, result.stderr
    return path


def test_there_and_back_is_bit_exact(official, converted, tmp_path):
    result = convert(converted, tmp_path / 'back.pth', '--reverse')
    assert result.returncode == 0, result.stderr
    before, after = (torch.load(p, weights_only=True) for p in (official, tmp_path / 'back.pth'))
    assert list(after) == ['model'] and list(after['model']) == list(before['model'])
    for key, value in before['model'].items():
        assert after['model'][key].dtype == value.dtype and torch.equal(after['model'][key], value)


def test_what_is_written_loads_into_this_projects_models(official, converted):
    entries = torch.load(converted, weights_only=True)['state_dict']
    assert {key.split('.')[0] for key in entries} == {'backbone', 'head'}
    assert 'head.fc.weight' in entries
    weights = torch.load(official, weights_only=True)['model']
    for checkpoint in (official, converted):
        model = VisionMamba(
            dict(embed_dims=16, depth=2),
            img_size=56,
            patch_size=4,
            init_cfg=dict(type='Pretrained', checkpoint=str(checkpoint)),
        )
        model.init_weights()
        assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_a_segmentor_gives_its_backbone_away(converted, tmp_path):
    entries = torch.load(converted, weights_only=True)['state_dict']
    entries = {key: value for key, value in entries.items() if key.startswith('backbone.')}
    entries |= {'decode_head.conv_seg.weight': torch.rand(3), 'neck.scale': torch.rand(1)}
    torch.save({'state_dict': entries, 'meta': {}, 'optimizer': {}}, tmp_path / 'iter_9.pth')
    result = convert(tmp_path / 'iter_9.pth', tmp_path / 'out.pth', '--reverse')
    assert 'left out: 2 entries of decode_head, neck' in result.stdout
    weights = torch.load(tmp_path / 'out.pth', weights_only=True)['model']
    assert len(weights) == len(entries) - 2 and 'pos_embed' in weights


def test_files_are_not_replaced_unless_forced(official, tmp_path):
    target = tmp_path / 'there.pth'
    target.write_text('precious')
    result = convert(official, target)
    assert result.returncode != 0 and 'there.pth is there already: pass --force' in result.stderr
    assert target.read_text() == 'precious'
    assert convert(official, target, '--force').returncode == 0
    assert 'state_dict' in torch.load(target, weights_only=True)
    assert [path.name for path in tmp_path.iterdir()] == ['there.pth']  # nothing half-written


def test_what_cannot_be_converted_is_said(official, converted, tmp_path):
    torch.save({'conv1.weight': torch.rand(1)}, tmp_path / 'resnet.pth')
    torch.save([1, 2], tmp_path / 'list.pth')
    (tmp_path / 'broken.pth').write_bytes(official.read_bytes()[:1000])
    for source, options, message in (
        (tmp_path / 'nothing.pth', [], 'nothing.pth: there is no such file'),
        (tmp_path / 'broken.pth', [], 'broken.pth cannot be read'),
        (tmp_path / 'list.pth', [], 'list.pth holds a list, not a checkpoint'),
        (tmp_path / 'resnet.pth', [], 'holds no official weights: 1 entries, the first are conv1'),
        (tmp_path / 'resnet.pth', ['--reverse'], 'holds no backbone of this project'),
        (converted, [], 'it looks like one of this project: --reverse?'),
    ):
        result = convert(source, tmp_path / 'out.pth', *options)
        assert result.returncode != 0
        assert message in result.stderr
    result = convert(official, tmp_path / 'no_folder' / 'out.pth')
    assert 'no_folder: there is no such folder' in result.stderr
    assert not (tmp_path / 'out.pth').exists()


def test_code_in_a_file_runs_only_if_it_is_trusted(official, tmp_path):
    trace, target = tmp_path / 'trace', tmp_path / 'out.pth'
    content = torch.load(official, weights_only=True)
    torch.save({**content, 'x': hostile.Touch(trace)}, tmp_path / 'hostile.pth')
    chain = hostile.checkpoint(hostile.payloads(trace)['getattr_chain'])
    hostile.write(tmp_path / 'chain.pth', chain, 'zip')
    for name in ('hostile', 'chain'):
        result = convert(tmp_path / f'{name}.pth', target)
        assert f'{name}.pth was refused' in result.stderr
        assert '--trust-checkpoint' in result.stderr
        assert not trace.exists() and not target.exists()
    assert convert(tmp_path / 'hostile.pth', target, '--trust-checkpoint').returncode == 0
    assert trace.exists() and len(torch.load(target, weights_only=True)['state_dict']) > 10


def test_safetensors_are_written_and_read_and_the_grid_is_kept(tmp_path):
    """8 x 32 patches, which would be taken for 16 x 16 if the file did not say."""
    from safetensors.torch import load_file

    arguments = dict(img_size=(32, 128), patch_size=4, cls_token=None)
    source = VisionMamba(dict(embed_dims=16, depth=2), **arguments)
    names = [str(tmp_path / name) for name in ('a.pth', 'b.safetensors', 'c.safetensors', 'd.pth')]
    torch.save({'model': source.state_dict()}, names[0])
    for i, options in enumerate(([], ['--reverse'], [])):
        assert convert(names[i], names[i + 1], *options).returncode == 0
    assert 'backbone.pos_embed' in load_file(names[1]) and 'pos_embed' in load_file(names[2])
    for name in names:
        init_cfg = dict(type='Pretrained', checkpoint=name)
        model = VisionMamba(dict(embed_dims=16, depth=2), **arguments, init_cfg=init_cfg)
        model.init_weights()
        assert torch.equal(model.pos_embed, source.pos_embed)


def test_averages_are_converted_on_request(official, tmp_path):
    weights = torch.load(official, weights_only=True)['model']
    averages = {key: value + 1 for key, value in weights.items()}
    torch.save({'model': weights, 'model_ema': averages}, tmp_path / 'both.pth')
    for options, expected in (((), weights), (('--weights', 'ema'), averages)):
        result = convert(tmp_path / 'both.pth', tmp_path / 'out.pth', '--force', *options)
        assert ("the file also holds weights='ema'" in result.stdout) == (not options)
        converted = torch.load(tmp_path / 'out.pth', weights_only=True)['state_dict']
        assert torch.equal(converted['backbone.pos_embed'], expected['pos_embed'])
