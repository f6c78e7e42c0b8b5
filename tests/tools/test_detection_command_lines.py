"""The real command lines for detection: train, test, resume, draw, and refuse bad data."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import mmdet
import pytest
import torch
from command_line import ROOT, passed, refused, scalars, tool

from mmvim.datasets.shapes import write_coco

DEMO = 'configs/vim/vim-demo_cascade-mask-rcnn_shapes-128x128.py'
COCO = 'configs/vim/vim-tiny_cascade-mask-rcnn_8xb8-380k_coco-1024x1024.py'


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    """Annotations that mmdet's own classes would fail on, or evaluate wrongly."""
    root = tmp_path_factory.mktemp('data') / 'shapes'
    write_coco(root, train=4, val=3, size=64)
    for path in (root / 'annotations').glob('*.json'):
        content = json.loads(path.read_text())
        for number, annotation in enumerate(content['annotations']):
            annotation['id'] = number  # from 0
            del annotation['area'], annotation['iscrowd']
        path.write_text(json.dumps(content))
    return root


def options(data: Path, **more) -> list[str]:
    """The demo config cut down to seconds."""
    settings = {f'{name}_dataloader.dataset.data_root': data for name in ('train', 'val', 'test')}
    # mmdet's own classes, in whose place the tools put this project's.
    settings |= {f'{n}_dataloader.dataset.type': 'CocoDataset' for n in ('train', 'val', 'test')}
    for name in ('val', 'test'):
        settings[f'{name}_evaluator.ann_file'] = data / 'annotations/instances_val.json'
    settings |= {
        'train_dataloader.batch_size': 2,
        'model.backbone.arch.embed_dims': 32,
        'model.backbone.arch.depth': 2,
        'model.backbone.img_size': 64,
        'model.neck.in_channels': 32,
        'model.test_cfg.rcnn.score_thr': 0.0,  # hardly trained: it is sure of nothing
        'train_cfg.max_iters': 4,
        'train_cfg.val_interval': 4,
        'default_hooks.checkpoint.interval': 2,
        'default_hooks.logger.interval': 1,
    }
    settings |= {key.replace('__', '.'): value for key, value in more.items()}
    return ['--cfg-options', *(f'{key}={value}' for key, value in settings.items())]


@pytest.fixture(scope='module')
def trained(data, tmp_path_factory) -> Path:
    """A work dir after 4 iterations."""
    work_dir = tmp_path_factory.mktemp('work')
    passed(tool('train.py', DEMO, '--work-dir', work_dir, *options(data)))
    return work_dir


def test_training_logs_every_loss_validates_and_saves(trained):
    assert (trained / 'iter_2.pth').exists() and (trained / 'iter_4.pth').exists()
    losses = ['loss_rpn_cls', 'loss_rpn_bbox']
    losses += [f's{i}.loss_{kind}' for i in range(3) for kind in ('cls', 'bbox', 'mask')]
    for name in losses:
        assert len(scalars(trained, name)) == 4, name
    for kind in ('bbox', 'segm'):
        assert 0 <= scalars(trained, f'coco/{kind}_mAP')[0] <= 1


@pytest.mark.slow
def test_resume_goes_on_where_training_stopped(data, trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    (tmp_path / 'iter_4.pth').unlink()
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_2.pth'))
    output = passed(tool('train.py', DEMO, '--work-dir', tmp_path, '--resume', *options(data)))
    assert 'resumed epoch: 0, iter: 2' in output
    assert scalars(tmp_path, 'iter')[:2] == [3, 4]
    resumed = torch.load(tmp_path / 'iter_4.pth', weights_only=True)
    assert resumed['optimizer']['state'][0]['step'] == 4


def test_testing_reports_draws_and_writes(data, trained, tmp_path):
    where = ['--work-dir', tmp_path, '--show-dir', tmp_path / 'pictures']
    dump = ['--out', tmp_path / 'found.pkl']
    passed(tool('test.py', DEMO, trained / 'iter_4.pth', *where, *dump, *options(data)))
    metrics = json.loads(next(tmp_path.glob('*/*.json')).read_text())
    for name in ('coco/bbox_mAP', 'coco/segm_mAP'):
        assert abs(metrics[name] - scalars(trained, name)[0]) < 1e-6  # as when validating
    pictures = list((tmp_path / 'pictures').glob('*.jpg'))
    assert len(pictures) == 3
    assert cv2.imread(str(pictures[0])).shape == (64, 128, 3)  # truth and prediction side by side
    found = pickle.loads((tmp_path / 'found.pkl').read_bytes())
    assert len(found) == 3 and {'bboxes', 'masks', 'scores'} <= set(found[0]['pred_instances'])

    # mmdet's analysis tools read the file; here they need to be told of the mended annotations.
    more = {'test_dataloader.dataset.type': 'CheckedCocoDataset'}
    more |= {'val_evaluator.type': 'CheckedCocoMetric'}
    analysis = Path(mmdet.__file__).parent / '.mim/tools/analysis_tools/eval_metric.py'
    given = [DEMO, tmp_path / 'found.pkl', *options(data, **more)]
    command = [sys.executable, analysis, *map(str, given)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert f"'coco/bbox_mAP': {metrics['coco/bbox_mAP']}" in passed(result)


def test_data_that_is_missing_is_named(data, tmp_path):
    here = ['--work-dir', tmp_path]
    elsewhere = ['--cfg-options', f'train_dataloader.dataset.data_root={tmp_path / "coco"}']
    message = refused(tool('train.py', COCO, *here, *elsewhere))
    assert 'train_dataloader.dataset.data_root' in message and 'docs/data.md' in message

    shutil.copytree(data, tmp_path / 'shapes')
    (tmp_path / 'shapes/train/shapes_train_00000003.jpg').unlink()
    message = refused(tool('train.py', DEMO, *here, *options(tmp_path / 'shapes')))
    assert 'names 1 of 4 images that do not exist' in message
    assert 'shapes_train_00000003.jpg' in message
