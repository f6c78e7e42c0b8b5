import re

import pytest
from command_line import passed, tool


@pytest.mark.parametrize(
    ('task', 'summary'),
    [
        ('segmentation', r'mIoU \d+\.\d on the held-out images'),
        pytest.param(
            'detection',
            r'box AP \d+\.\d, mask AP \d+\.\d on the held-out images',
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_demo_trains_tests_and_draws(task, summary, tmp_path):
    """Two iterations and three pictures of the real thing."""
    settings = {
        'train_cfg.max_iters': 2,
        'train_cfg.val_interval': 3,
        'train_dataloader.batch_size': 2,
        'default_hooks.checkpoint.interval': 2,
        'test_dataloader.dataset.indices': 3,
    }
    options = [f'{key}={value}' for key, value in settings.items()]
    where = ['--work-dir', tmp_path / 'work', '--data', tmp_path / 'data']
    output = passed(tool('demo.py', '--task', task, *where, '--cfg-options', *options))
    assert re.search(summary, output)
    assert [f'[{number}/3]' in output for number in (1, 2, 3)] == [True] * 3
    assert len(list((tmp_path / 'work/pictures').iterdir())) == 3
