"""Files that hold tensors and strings, and nothing else."""

import json
import sys
from pathlib import Path

import pytest
import torch
from mmengine.runner import Runner
from safetensors.torch import load_file, save_file

from mmvim import VisionMamba
from mmvim.models.sequence import resize_pos_embed
from mmvim.utils import CheckpointError, load_from_local, save_safetensors


def build(grid: tuple[int, int], file: Path | None = None) -> VisionMamba:
    model = VisionMamba(
        dict(embed_dims=16, depth=2, d_state=4),
        img_size=(grid[0] * 4, grid[1] * 4),
        patch_size=4,
        cls_token=None,
        init_cfg=file and dict(type='Pretrained', checkpoint=str(file)),
    )
    model.init_weights()
    return model


def test_plain_files_are_read_through_init_cfg_and_load_from(tmp_path):
    source = build((4, 4))
    weights = {key: value.contiguous() for key, value in source.state_dict().items()}
    save_file(weights, tmp_path / 'plain.safetensors')
    model = build((4, 4), tmp_path / 'plain.safetensors')
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())

    whole = torch.nn.Module()
    whole.backbone = build((4, 4))
    runner = Runner(
        whole,
        str(tmp_path),
        load_from=str(tmp_path / 'plain.safetensors'),
        custom_hooks=[dict(type='FitCheckpointHook')],
        experiment_name=tmp_path.name,
    )
    runner.load_or_resume()
    state = whole.backbone.state_dict()
    assert all(torch.equal(state[key], value) for key, value in weights.items())


def test_the_grid_is_kept(tmp_path):
    source = build((8, 32))
    save_safetensors(source.state_dict(), str(tmp_path / 'own.safetensors'))
    assert set(load_file(tmp_path / 'own.safetensors')) == set(source.state_dict())
    assert torch.equal(build((8, 32), tmp_path / 'own.safetensors').pos_embed, source.pos_embed)
    square = build((16, 16), tmp_path / 'own.safetensors')
    expected = resize_pos_embed(source.pos_embed, (8, 32), (16, 16), None)
    assert torch.equal(square.pos_embed, expected)


def test_damage_and_lies_are_told(tmp_path):
    save_file({'x': torch.rand(100)}, tmp_path / 'whole.safetensors')
    content = (tmp_path / 'whole.safetensors').read_bytes()
    for cut in (0, 5, 50, len(content) - 10):
        (tmp_path / 'cut.safetensors').write_bytes(content[:cut])
        with pytest.raises(CheckpointError, match='cut.safetensors cannot be read.*cut short'):
            load_from_local(str(tmp_path / 'cut.safetensors'))
    torch.save({}, tmp_path / 'pickle.safetensors')
    with pytest.raises(CheckpointError, match='pickle.safetensors cannot be read'):
        load_from_local(str(tmp_path / 'pickle.safetensors'))

    weights = {key: value.contiguous() for key, value in build((4, 4)).state_dict().items()}
    for said in ({'': {'grid': 'x'}}, {'': {'grid': [5, 5], 'cls_token': 'head'}}, [1], {'': 3}):
        save_file(weights, tmp_path / 'lies.safetensors', {'mmvim': json.dumps(said)})
        with pytest.raises(CheckpointError, match='lies.safetensors'):
            build((4, 4), tmp_path / 'lies.safetensors')
    save_file(weights, tmp_path / 'deep.safetensors', {'mmvim': 100_000 * '['})
    with pytest.raises(CheckpointError, match='deep.safetensors cannot be read'):
        build((4, 4), tmp_path / 'deep.safetensors')


def test_without_the_package_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    save_file({'x': torch.rand(1)}, tmp_path / 'x.safetensors')
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    with pytest.raises(CheckpointError, match='x.safetensors needs .* pip install safetensors'):
        load_from_local(str(tmp_path / 'x.safetensors'))
