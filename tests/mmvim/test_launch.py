"""How the tools end, and what they add to every config."""

import time
from pathlib import Path

import pytest
import torch
from mmengine.registry import init_default_scope
from torch import distributed, nn

from mmvim.utils.launch import common_parser, leave_processes, load_config, run

THREADS = Path('/proc/self/task')


def loaded(tmp_path, text: str, *arguments: str):
    path = tmp_path / 'config.py'
    path.write_text(text)
    return load_config(common_parser('').parse_args([str(path), *arguments]))


def test_hooks_are_added_once(tmp_path):
    cfg = loaded(tmp_path, '')
    assert [hook.type for hook in cfg.custom_hooks] == ['FitCheckpointHook', 'CheckDataHook']
    own = "custom_hooks = [dict(type='CheckDataHook', on_mismatch='warn')]"
    cfg = loaded(tmp_path, own)
    assert [hook.type for hook in cfg.custom_hooks] == ['CheckDataHook', 'FitCheckpointHook']
    assert cfg.custom_hooks[0].on_mismatch == 'warn'


@pytest.mark.parametrize(
    ('given', 'value'),
    [
        ('/my data/ade', '/my data/ade'),
        ('/data (copy)/my  ade', '/data (copy)/my  ade'),
        ('"/my data/ade"', '/my data/ade'),
        ('[/my data/a, /my data/b]', ['/my data/a', '/my data/b']),
        ('(1, 2)', (1, 2)),
        ('[ (64, 64), [a b, 0.5] ]', [(64, 64), ['a b', 0.5]]),
        (' 3 ', 3),
    ],
)
def test_options_keep_the_spaces_in_paths(given, value):
    arguments = ['config.py', '--cfg-options', 'x=1', f'key={given}']
    assert common_parser('').parse_args(arguments).cfg_options == dict(x=1, key=value)


def test_a_batch_of_one_under_batch_norm_is_explained():
    def main():
        nn.BatchNorm2d(4)(torch.rand(1, 4, 1, 1))

    with pytest.raises(SystemExit, match='train_dataloader.batch_size of 2 or more.*norm_cfg='):
        run(main)


def test_a_data_set_without_pictures_is_named(tmp_path):
    from mmseg.registry import DATASETS

    for folder in ('images', 'labels'):
        (tmp_path / folder).mkdir()
    init_default_scope('mmseg')

    def main():
        prefix = dict(img_path='images', seg_map_path='labels')
        DATASETS.build(dict(type='BaseSegDataset', data_root=str(tmp_path), data_prefix=prefix))

    with pytest.raises(SystemExit, match=rf'data set is empty \(BaseSegDataset, {tmp_path}/images'):
        run(main)


def test_other_errors_keep_their_traceback():
    def main():
        raise ValueError('anything else')

    with pytest.raises(ValueError, match='anything else'):
        run(main)


@pytest.mark.skipif(not THREADS.is_dir(), reason='lists threads by /proc')
def test_no_thread_of_the_process_group_is_left_when_python_shuts_down():
    before = set(THREADS.iterdir())
    store = distributed.HashStore()
    distributed.init_process_group('gloo', store=store, rank=0, world_size=1)
    model = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
    model.cycle = [model]  # as between a runner and its hooks
    started = set(THREADS.iterdir()) - before
    assert started
    del model
    leave_processes()
    deadline = time.monotonic() + 10  # the list may be late by a moment
    while left := started & set(THREADS.iterdir()):
        assert time.monotonic() < deadline, f'{len(left)} threads are left'
        time.sleep(0.01)
