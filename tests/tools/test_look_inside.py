"""Two models are drawn on the same pictures."""

import json

import numpy as np
import pytest
import torch
from command_line import ROOT, passed, refused, tool
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

NANO = ROOT / 'configs/vim/vim-nano_upernet_1xb4-2k_camvid-192x256.py'


@pytest.mark.slow
def test_fields_and_features_are_drawn(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(2):
        pixels = rng.integers(256, size=(64, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f'{k}.png')
    models = []
    for direction in ('none', 'ssm_conv'):
        cfg = Config.fromfile(NANO)
        cfg.model.backbone.update(directions=direction, arch=dict(embed_dims=96, depth=2))
        cfg.model.backbone.out_indices = -1
        init_default_scope('mmseg')
        checkpoint, config = tmp_path / f'{direction}.pth', tmp_path / f'{direction}.py'
        torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict(), meta={}), checkpoint)
        cfg.dump(config)
        models += ['--model', direction, config, checkpoint]
    out = tmp_path / 'out'
    output = passed(tool('analysis_tools/look_inside.py', tmp_path, *models, '--out-dir', out))
    shares = json.loads((out / 'receptive_field.json').read_text())['share_of_area']
    assert 'none 50 % in' in output and set(shares) == {'none', 'ssm_conv'}
    assert 0 < shares['none']['50 %'] < shares['none']['99 %'] <= 1
    # A forward scan sees nothing of the rows below the centre.
    assert shares['none']['99 %'] < shares['ssm_conv']['99 %']
    assert Image.open(out / 'features.png').size == (3 * 360, 24 + 2 * 240)

    message = refused(tool('analysis_tools/look_inside.py', tmp_path / 'absent', *models))
    assert 'absent' in message
