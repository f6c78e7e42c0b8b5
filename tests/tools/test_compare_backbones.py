"""A comparison is made in pieces: what is done is kept, what was stopped goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from command_line import ROOT, passed, refused, tool
from PIL import Image

TOOL = 'analysis_tools/compare_backbones.py'
OPTIONS = ['train_cfg.max_iters=4', 'train_cfg.val_interval=4', 'train_dataloader.batch_size=2']
OPTIONS += ['default_hooks.checkpoint.interval=1', 'default_hooks.logger.interval=1']


@pytest.fixture(scope='module')
def camvid(tmp_path_factory) -> Path:
    """Pictures whose classes are eleven greys, in CamVid's layout; a column is void."""
    root, rng = tmp_path_factory.mktemp('camvid'), np.random.default_rng(0)
    for split, count in (('train', 4), ('val', 1), ('test', 2)):
        images, annotations = root / 'images' / split, root / 'annotations' / split
        images.mkdir(parents=True)
        annotations.mkdir(parents=True)
        for k in range(count):
            labels = rng.integers(11, size=(6, 8), dtype=np.uint8).repeat(24, 0).repeat(24, 1)
            Image.fromarray(23 * labels).convert('RGB').save(images / f'{k}.jpg')
            labels[:, :10] = 255
            Image.fromarray(labels).save(annotations / f'{k}.png')
    return root


def arguments(camvid: Path, work_dir: Path) -> list:
    return ['camvid', '--data', camvid, '--work-dir', work_dir, '--cfg-options', *OPTIONS]


@pytest.mark.slow
def test_sides_are_trained_in_turns_and_compared(tmp_path, camvid):
    tmp_path /= 'comparison'
    common = arguments(camvid, tmp_path)
    output = passed(tool(TOOL, *common, '--seeds', 2, '--max-runs', 1))
    assert '1 of 4 runs' in output
    assert [path.parent.name for path in tmp_path.glob('*/result.json')] == ['vim_seed0']
    assert 'go on with --resume' in refused(tool(TOOL, *common))

    log = (tmp_path / 'vim_seed0/train.log').read_text()
    two = ['--max-runs', 2, '--jobs', 2]
    output = passed(tool(TOOL, *common, '--seeds', 2, *two, '--resume'))
    assert '3 of 4 runs' in output
    assert (tmp_path / 'vim_seed0/train.log').read_text() == log  # not trained again
    assert (tmp_path / 'deit_seed0/result.json').is_file()  # before DeiT's seed 1

    results = json.loads((tmp_path / 'results.json').read_text())
    table = (tmp_path / 'table.md').read_text()
    for side, seeds in (('vim', 2), ('deit', 1)):
        runs = list(results['runs'][side].values())
        scores = [run['metrics']['mIoU'] for run in runs]
        assert len(scores) == seeds
        cells = [f'{score:.1f}' for score in scores] + [''] * (2 - seeds)
        row = ' | '.join([f'`{side}`', f'{runs[0]["parameters"]:,}', *cells])
        assert f'| {row} | {np.mean(scores):.1f} |' in table
        # What is computed from the label maps is what mmseg computes from the scores.
        assert abs(np.mean(results['iou'][side]) - np.mean(scores)) < 0.01
    sheet = Image.open(tmp_path / 'pictures.png')  # image, ground truth and two sides of 192 x 144
    assert sheet.size == (4 * 320, 24 + 2 * 240)
    assert {'confusion.png', 'curve_loss.png', 'curve_mIoU.png'} <= set(os.listdir(tmp_path))

    other = [*common, 'optim_wrapper.optimizer.lr=1', '--resume']
    message = refused(tool(TOOL, *other))
    assert 'vim_seed0 was trained with' in message and 'choose another --work-dir' in message


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path, camvid):
    side = ['--seeds', 1, '--sides', 'vim', '--lr', '2e-3', '--split', 'val']

    def command(max_iters: int) -> list:
        length = [f'train_cfg.{key}={max_iters}' for key in ('max_iters', 'val_interval')]
        return [*arguments(camvid, tmp_path), *length, *side]

    endless = [sys.executable, str(ROOT / 'tools' / TOOL), *map(str, command(10_000))]
    process = subprocess.Popen(endless, stdout=subprocess.DEVNULL, start_new_session=True)
    run = tmp_path / 'vim_lr2e-3_seed0'
    while not (run / 'last_checkpoint').is_file():
        assert process.poll() is None, (run / 'train.log').read_text()[-3000:]
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)  # the training, too
    process.wait()
    assert not (run / 'result.json').exists()

    reached = int(Path((run / 'last_checkpoint').read_text()).stem.removeprefix('iter_'))
    passed(tool(TOOL, *command(reached + 3), '--resume'))
    assert 'the newest checkpoint that is whole' in (run / 'train.log').read_text()
    results = json.loads((tmp_path / 'results.json').read_text())
    checkpoint = results['runs']['vim_lr2e-3']['0']['checkpoint']
    assert checkpoint.endswith(f'iter_{reached + 3}.pth')
    assert [path.name for path in (run / 'predictions').iterdir()] == ['0.png']  # of one, not two


def test_what_cannot_be_compared_is_refused(tmp_path):
    absent = ['--data', tmp_path / 'absent']
    message = refused(tool(TOOL, 'camvid', *absent))
    assert f'{tmp_path}/absent is not there' in message and 'docs/data.md' in message
    message = refused(tool(TOOL, 'camvid', *absent, '--arch', 'huge'))
    assert "camvid has 0 configs for vim of arch 'huge'" in message
    message = refused(tool(TOOL, 'pennfudan', *absent, '--split', 'val'))
    assert 'pennfudan has no validation split' in message
    message = refused(tool(TOOL, 'camvid', '--sides', 'vim-max-pool'))
    assert "camvid has no 'vim-max-pool'" in message
