"""The real command lines on generated data: train, test, resume, draw, and refuse."""

import json
import pickle
import shutil
from pathlib import Path

import cv2
import hostile
import pytest
import torch
from command_line import ROOT, passed, refused, scalars, tool
from mmengine.evaluator import Evaluator
from mmseg.evaluation import IoUMetric

from mmvim import VisionMamba
from mmvim.datasets.shapes import CLASSES, write_ade20k

DEMO = 'configs/vim/vim-demo_upernet_shapes-128x128.py'


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp('data with spaces') / 'the shapes'
    write_ade20k(root, train=6, val=3, size=64)
    return root


def options(data: Path, **more) -> list[str]:
    """The demo config cut down to seconds."""
    settings = {f'{name}_dataloader.dataset.data_root': data for name in ('train', 'val', 'test')}
    settings |= {
        'train_dataloader.batch_size': 2,
        'model.backbone.arch.embed_dims': 32,
        'model.backbone.arch.depth': 4,
        'model.backbone.out_indices': '0,1,2,3',
        'model.backbone.img_size': 64,
        'model.data_preprocessor.size': '64,64',
        'model.neck.in_channels': 32,
        'model.decode_head.in_channels': '32,32,32,32',
        'model.decode_head.channels': 16,
        'model.auxiliary_head.in_channels': 32,
        'default_hooks.checkpoint.interval': 2,
        'default_hooks.checkpoint.save_best': 'mIoU',
        'default_hooks.logger.interval': 1,
    }
    settings |= {key.replace('__', '.'): value for key, value in more.items()}
    return ['--cfg-options', *(f'{key}={value}' for key, value in settings.items())]


@pytest.fixture(scope='module')
def trained(data, tmp_path_factory) -> Path:
    """A work dir after 4 iterations."""
    work_dir = tmp_path_factory.mktemp('work dir with spaces')
    settings = options(data, train_cfg__max_iters=4, train_cfg__val_interval=4)
    passed(tool('train.py', DEMO, '--work-dir', work_dir, *settings))
    return work_dir


def test_training_logs_validates_and_saves(trained):
    assert (trained / 'iter_2.pth').exists() and (trained / 'iter_4.pth').exists()
    assert len(scalars(trained, 'loss')) == 4
    assert 0 <= scalars(trained, 'mIoU')[0] <= 100


def test_resume_goes_on_where_training_stopped(data, trained, tmp_path):
    # As after a kill: the newest checkpoint is from iteration 2.
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    (tmp_path / 'iter_4.pth').unlink()
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_2.pth'))
    settings = options(data, train_cfg__max_iters=4, train_cfg__val_interval=4)
    output = passed(tool('train.py', DEMO, '--work-dir', tmp_path, '--resume', *settings))
    assert 'resumed epoch: 0, iter: 2' in output
    assert scalars(tmp_path, 'iter')[:2] == [3, 4]
    resumed = torch.load(tmp_path / 'iter_4.pth', weights_only=True)
    assert resumed['optimizer']['state'][0]['step'] == 4
    assert resumed['param_schedulers'][0]['last_step'] == 4


@pytest.mark.slow
def test_resume_from_a_named_checkpoint_without_validation(data, trained, tmp_path):
    settings = options(data, train_cfg__max_iters=3)
    named = ['--resume', trained / 'iter_2.pth', '--no-validate']
    output = passed(tool('train.py', DEMO, '--work-dir', tmp_path, *named, *settings))
    assert 'resumed epoch: 0, iter: 2' in output
    assert scalars(tmp_path, 'iter') == [3]
    assert scalars(tmp_path, 'mIoU') == []


def test_testing_reports_draws_and_writes(data, trained, tmp_path):
    checkpoint = trained / 'iter_4.pth'
    destinations = ['--work-dir', tmp_path, '--show-dir', 'pictures', '--out', tmp_path / 'out']
    # From another folder: a relative --show-dir is the user's, not the repository's.
    config = [ROOT / DEMO, checkpoint]
    output = passed(tool('test.py', *config, *destinations, *options(data), cwd=tmp_path))
    assert '|  ground  |' in output
    metrics = json.loads(next(tmp_path.glob('*/*.json')).read_text())
    assert abs(metrics['mIoU'] - scalars(trained, 'mIoU')[0]) < 0.01  # as when validating
    pictures = list((tmp_path / 'pictures').glob('*.png'))
    assert len(pictures) == 3
    assert cv2.imread(str(pictures[0])).shape == (64, 128, 3)  # truth and prediction side by side
    maps = sorted((tmp_path / 'out').glob('*.png'))
    assert len(maps) == 3
    assert cv2.imread(str(maps[0]), cv2.IMREAD_UNCHANGED).shape == (64, 64)


def test_a_head_without_weights_is_not_tested(data, trained, tmp_path):
    weights = torch.load(trained / 'iter_4.pth', weights_only=True)['state_dict']
    backbone = {key: value for key, value in weights.items() if key.startswith('backbone.')}
    torch.save({'state_dict': backbone}, tmp_path / 'backbone.pth')
    arguments = [DEMO, tmp_path / 'backbone.pth', '--work-dir', tmp_path, *options(data)]
    message = refused(tool('test.py', *arguments))
    assert 'backbone.pth does not have all of the model: neck.' in message


def test_unsafe_and_broken_checkpoints_are_refused(data, trained, tmp_path):
    trace, bad, cut = (tmp_path / name for name in ('trace', 'bad.pth', 'cut.pth'))
    payload = hostile.checkpoint(hostile.payloads(trace)['getattr_chain'])
    hostile.write(bad, payload, 'zip')
    cut.write_bytes((trained / 'iter_4.pth').read_bytes()[:5000])
    work_dir = ['--work-dir', tmp_path]
    for arguments in (('test.py', DEMO, bad), ('train.py', DEMO, '--resume', bad)):
        message = refused(tool(*arguments, *work_dir, *options(data)))
        assert 'bad.pth was refused' in message and '--trust-checkpoint' in message
        assert not trace.exists()
    message = refused(tool('test.py', DEMO, cut, *work_dir, *options(data)))
    assert 'cut.pth cannot be read' in message and '5000 bytes' in message


@pytest.mark.slow
def test_a_trusted_checkpoint_may_be_more_than_weights(data, trained, tmp_path):
    content = torch.load(trained / 'iter_4.pth', weights_only=True)
    path = tmp_path / 'with_path.pth'
    torch.save({**content, 'origin': Path('somewhere')}, path)
    arguments = [DEMO, path, '--work-dir', tmp_path, *options(data)]
    assert 'was refused' in refused(tool('test.py', *arguments))
    assert 'mIoU' in passed(tool('test.py', *arguments, '--trust-checkpoint'))


def test_what_is_missing_is_named(data, tmp_path):
    real = 'configs/vim/vim-tiny_upernet_8xb2-160k_ade20k-512x512.py'
    here = ['--work-dir', tmp_path]
    message = refused(tool('train.py', 'configs/nothing.py', *here))
    assert 'configs/nothing.py: there is no such file' in message

    elsewhere = ['--cfg-options', f'train_dataloader.dataset.data_root={tmp_path / "ade"}']
    message = refused(tool('train.py', real, *here, *elsewhere))
    assert 'train_dataloader.dataset.data_root' in message and 'docs/data.md' in message

    (tmp_path / 'cls.py').write_text("default_scope = 'mmpretrain'\n")
    message = refused(tool('train.py', tmp_path / 'cls.py', *here))
    assert 'mmpretrain, which is not installed' in message and '[cls]' in message

    (tmp_path / 'inherits.py').write_text("_base_ = 'mmpretrain::_base_/default_runtime.py'\n")
    assert 'mmpretrain, which is not' in refused(tool('train.py', tmp_path / 'inherits.py', *here))


@pytest.mark.slow
def test_official_weights_are_loaded_or_refused_with_the_reason(data, tmp_path):
    weights = VisionMamba(dict(embed_dims=32, depth=4), img_size=224).state_dict()
    small = {key: value for key, value in weights.items() if 'patch_embed' not in key}
    small['patch_embed.proj.weight'] = torch.rand(32, 3, 8, 8)
    small['patch_embed.proj.bias'] = torch.rand(32)
    torch.save({'model': small}, tmp_path / 'official.pth')
    torch.save({'model': weights}, tmp_path / 'patch16.pth')
    arguments = [DEMO, '--work-dir', tmp_path, '--no-validate']

    def start_from(name: str) -> list[str]:
        settings = {'train_cfg.max_iters': 1, 'load_from': tmp_path / name}
        return options(data, **settings)

    output = passed(tool('train.py', *arguments, *start_from('official.pth')))
    assert f'entries of {tmp_path / "official.pth"}; names translated' in output
    assert 'pos_embed 197 → 64 rows (14 × 14 → 8 × 8); ignored cls_token' in output
    message = refused(tool('train.py', *arguments, *start_from('patch16.pth')))
    assert 'of another shape: patch_embed.proj.weight (32, 3, 16, 16) for (32, 3, 8, 8)' in message


def test_training_stops_when_its_numbers_are_no_numbers(data, tmp_path):
    settings = options(data, train_cfg__max_iters=6, optim_wrapper__optimizer__lr=1e20)
    message = refused(tool('train.py', DEMO, '--work-dir', tmp_path, '--no-validate', *settings))
    assert 'training stopped at iteration' in message and 'is not finite (first of' in message
    for path in tmp_path.glob('iter_*.pth'):
        weights = torch.load(path, weights_only=True)['state_dict'].values()
        assert all(weight.isfinite().all() for weight in weights)


@pytest.mark.slow
@pytest.mark.parametrize(('dtype', 'kind'), [((), 'bfloat16'), (('float16',), 'float16')])
def test_mixed_precision_trains_on_this_machine_too(data, tmp_path, dtype, kind):
    settings = options(data, train_cfg__max_iters=3, optim_wrapper__loss_scale__init_scale=256.0)
    arguments = [DEMO, '--work-dir', tmp_path, '--no-validate', '--amp', *dtype]
    output = passed(tool('train.py', *arguments, *settings))
    wrapper = 'AmpOptimWrapper' if torch.cuda.is_available() else 'CpuAmpOptimWrapper'
    assert f"type='{wrapper}'" in output
    losses = scalars(tmp_path, 'loss')
    assert len(losses) == 3 and all(0 < loss < 100 for loss in losses)
    state = torch.load(tmp_path / 'iter_2.pth', weights_only=True)
    assert state['state_dict']['backbone.pos_embed'].dtype == torch.float32
    if not torch.cuda.is_available():
        assert ('loss_scaler' in state['optimizer']) == (kind == 'float16')


LIST = """
_base_ = {base!r}
test_evaluator = [
    dict(type='IoUMetric', iou_metrics=['mIoU']),
    dict(type='IoUMetric', iou_metrics=['mDice'], prefix='dice')]
"""


@pytest.mark.slow
def test_evaluators_in_a_list_and_predictions_in_a_file(data, trained, tmp_path):
    config = tmp_path / 'my configs' / 'two metrics.py'
    config.parent.mkdir()
    config.write_text(LIST.format(base=str(ROOT / DEMO)))
    arguments = [config, trained / 'iter_4.pth', '--work-dir', tmp_path, *options(data)]
    passed(tool('test.py', *arguments, '--out', tmp_path / 'label maps'))
    assert len(list((tmp_path / 'label maps').glob('*.png'))) == 3

    file = tmp_path / 'predictions.pkl'
    passed(tool('test.py', *arguments, '--out', file))
    metrics = json.loads(max(tmp_path.glob('*/*.json')).read_text())
    assert {'mIoU', 'dice/mDice'} <= set(metrics)
    predictions = pickle.loads(file.read_bytes())
    assert len(predictions) == 3
    assert predictions[0]['pred_sem_seg']['data'].dtype == torch.uint8
    assert 'seg_logits' not in predictions[0]
    evaluator = Evaluator(IoUMetric())
    evaluator.dataset_meta = dict(classes=CLASSES)
    assert evaluator.offline_evaluate(predictions)['mIoU'] == metrics['mIoU']


def test_label_maps_need_a_metric_that_writes_them(data, tmp_path):
    config = tmp_path / 'config.py'
    other = "test_evaluator = dict(_delete_=True, type='CityscapesMetric', output_dir='x')"
    config.write_text(f'_base_ = {str(ROOT / DEMO)!r}\n{other}\n')
    arguments = [config, 'x.pth', '--work-dir', tmp_path, '--out', 'maps', *options(data)]
    assert 'test_evaluator lacks' in refused(tool('test.py', *arguments))


PURE_PYTHON = """
from mmcv.transforms import LoadImageFromFile
from mmengine.dataset import InfiniteSampler
from mmengine.optim import OptimWrapper
from mmengine.runner import IterBasedTrainLoop
from mmseg.datasets.transforms import LoadAnnotations, PackSegInputs
from mmseg.models import EncoderDecoder, FCNHead, SegDataPreProcessor
from torch.optim import AdamW

from mmvim import VisionMamba
from mmvim.datasets import ShapesDataset

model = dict(
    type=EncoderDecoder,
    data_preprocessor=dict(type=SegDataPreProcessor, size=(64, 64)),
    backbone=dict(type=VisionMamba, arch=dict(embed_dims=16, depth=1), img_size=64, cls_token=None),
    decode_head=dict(
        type=FCNHead, in_channels=16, channels=16, num_convs=0, concat_input=False, num_classes=7,
        norm_cfg=dict(type='BN')),
    train_cfg=dict(), test_cfg=dict(mode='whole'))
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type=InfiniteSampler),
    dataset=dict(
        type=ShapesDataset,
        data_root={root!r},
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        pipeline=[
            dict(type=LoadImageFromFile), dict(type=LoadAnnotations), dict(type=PackSegInputs)]))
train_cfg = dict(type=IterBasedTrainLoop, max_iters=1)
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=AdamW, lr=1e-3))
"""


@pytest.mark.slow
def test_a_pure_python_config_trains_in_mixed_precision(data, tmp_path):
    config = tmp_path / 'pure python.py'
    config.write_text(PURE_PYTHON.format(root=str(data)))
    passed(tool('train.py', config, '--work-dir', tmp_path / 'work dir', '--amp'))
    assert list((tmp_path / 'work dir').glob('*.pth'))
    wrong = config.read_text().replace('num_classes=7', 'num_classes=150')
    config.write_text(wrong)
    message = refused(tool('train.py', config, '--work-dir', tmp_path / 'work dir', '--amp'))
    assert 'decode_head.num_classes=150' in message and 'ShapesDataset' in message


@pytest.mark.slow
def test_a_batch_of_one_is_explained(data, tmp_path):
    settings = options(data, train_dataloader__batch_size=1)
    message = refused(tool('train.py', DEMO, '--work-dir', tmp_path, *settings))
    assert 'train_dataloader.batch_size of 2 or more' in message
