"""The command lines on a generated image folder: train, test, resume, official weights."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from mmvim import VisionMamba
from mmvim.datasets.shapes import CLASSES, draw_scene

ROOT = Path(__file__).parents[2]
CONFIG = """
_base_ = '{root}/configs/vim/vim-tiny_8xb128_in1k.py'
model = dict(
    backbone=dict(arch=dict(_delete_=True, embed_dims=32, depth=4), img_size=64),
    head=dict(num_classes=3, in_channels=32, topk=(1,)))
data_preprocessor = dict(num_classes=3)
dataset = dict(_delete_=True, type='CustomDataset', data_root='{data}')
loader = dict(batch_size=6, num_workers=0, persistent_workers=False)
train_dataloader = dict(
    **loader, dataset=dict(**dataset, data_prefix='train', pipeline={{{{_base_.train_pipeline}}}}))
val_dataloader = dict(
    **loader, dataset=dict(**dataset, data_prefix='val', pipeline={{{{_base_.test_pipeline}}}}))
test_dataloader = val_dataloader
val_evaluator = dict(_delete_=True, type='Accuracy', topk=(1,))
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=2)
default_hooks = dict(logger=dict(interval=1))
"""


def tool(name: str, *arguments) -> str:
    command = [sys.executable, str(ROOT / 'tools' / name), *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-3000:]
    return output


def scalars(work_dir: Path, key: str) -> list[float]:
    log = max(work_dir.glob('*/vis_data/scalars.json'))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [line[key] for line in lines if key in line]


@pytest.fixture(scope='module')
def config(tmp_path_factory) -> Path:
    """A config for folders of pictures of one kind of shape each."""
    root = tmp_path_factory.mktemp('folders')
    for split, wanted, seed in (('train', 8, 0), ('val', 4, 1)):
        rng, saved = np.random.default_rng(seed), dict.fromkeys(CLASSES[1:4], 0)
        while min(saved.values()) < wanted:
            scene = draw_scene(rng, 64)
            for instance in scene.instances:
                name = CLASSES[instance.label]
                if saved.get(name, wanted) < wanted:
                    path = root / 'data' / split / name / f'{name}_{saved[name]}.png'
                    path.parent.mkdir(parents=True, exist_ok=True)
                    cv2.imwrite(str(path), scene.image * instance.mask[..., None])
                    saved[name] += 1
    path = root / 'config.py'
    path.write_text(CONFIG.format(root=ROOT, data=root / 'data'))
    return path


@pytest.fixture(scope='module')
def trained(config, tmp_path_factory) -> Path:
    work_dir = tmp_path_factory.mktemp('work')
    tool('train.py', config, '--work-dir', work_dir)
    return work_dir


def test_training_two_epochs_logs_validates_and_saves(trained):
    losses = scalars(trained, 'loss')
    assert len(losses) == 2 * 24 // 6 and np.isfinite(losses).all()
    assert len(scalars(trained, 'accuracy/top1')) == 2
    assert {'epoch_1.pth', 'epoch_2.pth'} <= {path.name for path in trained.glob('*.pth')}
    state = torch.load(trained / 'epoch_2.pth', weights_only=True)
    assert 'ema_state_dict' in state


def test_resume_goes_on_where_training_stopped(config, trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    (tmp_path / 'epoch_2.pth').unlink()
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_1.pth'))
    output = tool('train.py', config, '--work-dir', tmp_path, '--resume')
    assert 'resumed epoch: 1, iter: 4' in output
    assert len(scalars(tmp_path, 'loss')) == 4
    resumed = torch.load(tmp_path / 'epoch_2.pth', weights_only=True)
    assert resumed['optimizer']['state'][0]['step'] == 8


def test_testing_reports_and_writes_predictions(config, trained, tmp_path):
    out = tmp_path / 'out.pkl'
    arguments = [config, trained / 'epoch_2.pth', '--work-dir', tmp_path, '--out', out]
    tool('test.py', *arguments, '--show-dir', tmp_path / 'pictures')
    metrics = json.loads(next(tmp_path.glob('*/*.json')).read_text())
    assert metrics['accuracy/top1'] == pytest.approx(scalars(trained, 'accuracy/top1')[-1])
    predictions = pickle.loads(out.read_bytes())
    assert len(predictions) == 12 and predictions[0]['pred_score'].shape == (3,)
    assert len(list((tmp_path / 'pictures').rglob('*.png'))) == 12


def test_official_weights_are_tested_and_fine_tuned(config, tmp_path):
    torch.manual_seed(0)
    weights = VisionMamba(dict(embed_dims=32, depth=4), 224).state_dict()
    weights |= {'head.weight': torch.zeros(3, 32), 'head.bias': torch.tensor([0.0, 9.0, 0.0])}
    official = tmp_path / 'official.pth'
    torch.save({'model': weights}, official)
    output = tool('test.py', config, official, '--work-dir', tmp_path / 'test')
    translated = 'names translated to backbone.* and head.fc.*; pos_embed 197 → 17 rows'
    assert f'entries of {official}; {translated}' in output
    metrics = json.loads(next((tmp_path / 'test').glob('*/*.json')).read_text())
    assert metrics['accuracy/top1'] == pytest.approx(100 / 3)  # always the second class
    options = [f'load_from={official}', 'train_cfg.max_epochs=1']
    arguments = [config, '--work-dir', tmp_path, '--amp', 'bfloat16', '--cfg-options', *options]
    output = tool('train.py', *arguments)
    assert f'entries of {official}' in output and np.isfinite(scalars(tmp_path, 'loss')).all()
