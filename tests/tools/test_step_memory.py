import re

import pytest
from command_line import passed, refused, tool

SEGMENTATION = 'configs/vim/vim-demo_upernet_shapes-128x128.py'
DETECTION = 'configs/vim/vim-demo_cascade-mask-rcnn_shapes-128x128.py'


def measured(*arguments) -> tuple[int, float, str]:
    """Peak in MiB, seconds, and everything that was printed."""
    output = passed(tool('analysis_tools/step_memory.py', *arguments, '--steps', 1))
    peak, seconds = re.search(r'peak (\d+) MiB above \d+ MiB, ([\d.]+) s', output).groups()
    return int(peak), float(seconds), output


@pytest.mark.slow
def test_a_training_step_takes_more_than_a_test_step():
    small = ['--size', 64, '--batch-size', 2]
    training = measured(DETECTION, *small)
    testing = measured(DETECTION, *small, '--mode', 'test')
    assert training[0] > testing[0] > 0 and training[1] > 0
    assert 's2.loss_mask' in training[2] and 's2.loss_mask' not in testing[2]


def test_segmentation_is_measured_too():
    peak, _, output = measured(SEGMENTATION, '--size', 64, '--batch-size', 2)
    assert peak > 0 and 'decode.loss_ce' in output


def test_bad_arguments_are_named(tmp_path):
    message = refused(tool('analysis_tools/step_memory.py', DETECTION, '--size', 0))
    assert '--size must be positive' in message
    (tmp_path / 'config.py').write_text("default_scope = 'mmpretrain'\n")
    message = refused(tool('analysis_tools/step_memory.py', tmp_path / 'config.py'))
    assert "no pictures for default_scope='mmpretrain'" in message
