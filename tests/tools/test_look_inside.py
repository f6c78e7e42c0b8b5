"""Two models are drawn on the same pictures."""

import json

import numpy as np
import pytest
import torch
from command_line import ROOT, passed, refused, tool
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

from mmvim.apis import read_picture

NANO = ROOT / 'configs/vim/vim-nano_upernet_1xb4-2k_camvid-192x256.py'


@pytest.mark.slow
def test_fields_and_features_are_drawn(tmp_path):
    rng = np.random.default_rng(0)
    colours = rng.integers(256, size=(64, 96, 3), dtype=np.uint8)
    Image.fromarray(colours).save(tmp_path / '0.png')
    deep = rng.integers(2**12, size=(64, 96), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / '1.png')
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
    for k in range(2):
        drawn = np.array(Image.open(out / 'maps' / f'image_{k}.png'))
        np.testing.assert_array_equal(drawn, read_picture(tmp_path / f'{k}.png'))

    message = refused(tool('analysis_tools/look_inside.py', tmp_path / 'absent', *models))
    assert 'absent' in message


NOTHING = '--model', 'vim', NANO, 'weights.pth'


@pytest.mark.parametrize(
    'arguments, reason',
    [
        (['good.png', 'broken.png', *NOTHING], 'broken.png: broken, or no picture'),
        (['empty', *NOTHING], 'there is no picture in empty'),
        (['.', *NOTHING], 'there is no picture in .; notes.txt: unknown type .txt'),
        (['good.png', *NOTHING, '--shape', '64', '0'], '--shape must be positive, got 64 0'),
        (['good.png', *NOTHING, *NOTHING], '--model needs names that differ'),
        (['good.png', '--model', 'a/b', *NOTHING[2:]], "names of files, and not 'image', got a/b"),
        (['good.png', *NOTHING, '--out-dir', 'good.png'], 'good.png is a file'),
    ],
)
def test_what_cannot_be_drawn_is_named_in_one_line(tmp_path, arguments, reason):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'notes.txt').write_text('none')
    if '.' not in arguments:
        Image.new('RGB', (96, 64)).save(tmp_path / 'good.png')
        content = (tmp_path / 'good.png').read_bytes()
        (tmp_path / 'broken.png').write_bytes(content[: len(content) // 2])
    message = refused(tool('analysis_tools/look_inside.py', *arguments, cwd=tmp_path))
    assert message.startswith('look_inside.py: ') and reason in message
