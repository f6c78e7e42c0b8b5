"""``tools/predict.py`` with a classifier, against the data set and model of its config."""

import csv
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, DefaultScope
from PIL import Image

from mmvim import VisionMamba
from mmvim.apis import load_model
from mmvim.datasets.shapes import draw_scene

ROOT = Path(__file__).parents[2]
CONFIG = """
_base_ = '{root}/configs/vim/vim-tiny_8xb128_in1k.py'
model = dict(
    backbone=dict(arch=dict(_delete_=True, embed_dims=32, depth=4), img_size=64),
    head=dict(in_channels=32))
"""


def test_pictures_get_the_classes_that_the_test_of_the_config_gives_them(tmp_path):
    (tmp_path / 'config.py').write_text(CONFIG.format(root=ROOT))
    torch.manual_seed(0)
    weights = VisionMamba(dict(embed_dims=32, depth=4), 64).state_dict()
    weights |= {'head.weight': torch.randn(1000, 32), 'head.bias': torch.zeros(1000)}
    torch.save({'model': weights}, tmp_path / 'official.pth')
    (tmp_path / 'photos').mkdir()
    for seed in range(3):
        scene = draw_scene(np.random.default_rng(seed), 300).image[: 240 + 30 * seed]
        cv2.imwrite(str(tmp_path / 'photos' / f'{seed}.png'), scene)

    command = [ROOT / 'tools/predict.py', 'config.py', 'official.pth', 'photos', '--device', 'cpu']
    command = [sys.executable, *map(str, command), '--batch-size', '2']
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert 'predicted 3 in' in result.stdout
    with open(tmp_path / 'predictions' / 'classes.csv', newline='') as file:
        rows = list(csv.DictReader(file))

    # Another way to the same: the data set that tools/test.py reads.
    model = load_model(tmp_path / 'config.py', tmp_path / 'official.pth', 'cpu')
    assert len(model.dataset_meta['classes']) == 1000  # ImageNet's, as the file has no names
    folder = dict(type='CustomDataset', data_root=str(tmp_path / 'photos'), with_label=False)
    folder['pipeline'] = model.cfg.test_dataloader.dataset.pipeline
    with DefaultScope.overwrite_default_scope('mmpretrain'), torch.no_grad():
        dataset = DATASETS.build(folder)
        samples = [model.test_step(pseudo_collate([dataset[k]]))[0] for k in range(len(dataset))]
    for row, sample in zip(rows, samples, strict=True):
        label = int(sample.pred_label)
        assert row['file'] == str(Path('photos', Path(sample.img_path).name))
        assert (row['label'], row['class']) == (str(label), model.dataset_meta['classes'][label])
        assert abs(float(row['score']) - float(sample.pred_score[label])) < 1e-3
    with Image.open(tmp_path / 'predictions' / 'pictures' / '1.jpg') as drawn:
        assert drawn.size == (300, 270)
