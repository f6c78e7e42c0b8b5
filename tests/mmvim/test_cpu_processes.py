"""Several processes without a GPU, over gloo, by the command lines."""

import subprocess

import pytest
import torch
from tiny_training import ROOT, config, environment, train, weights

PLAIN = ['--cfg-options', 'model.drop_path_rate=0.', 'randomness.seed=0']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('a path with spaces')


@pytest.fixture(scope='module')
def two(folder):
    """Two processes with 4 pictures each; also what they printed."""
    return train(config(folder), folder / 'two', *PLAIN, processes=2)


@pytest.mark.slow
def test_two_processes_of_4_images_train_as_one_of_8(folder, two):
    train(config(folder), folder / 'one', *PLAIN, 'train_dataloader.batch_size=8')
    one, both = weights(folder / 'one'), weights(folder / 'two')
    assert one.keys() == both.keys()
    for key, value in one.items():
        torch.testing.assert_close(both[key], value, rtol=0, atol=1e-6)
    assert 'Iter(train) [12/12]' in two


@pytest.mark.slow
def test_a_training_goes_on_with_another_number_of_processes(folder, two):
    settings = [*PLAIN, 'train_cfg.max_iters=16']
    output = train(config(folder), folder / 'two', '--resume', *settings)
    assert 'resumed epoch: 0, iter: 12' in output
    assert 'Iter(train) [16/16]' in output
    output = train(config(folder), folder / 'two', '--resume', *PLAIN, 'train_cfg.max_iters=20',
                   processes=2)  # fmt: skip
    assert 'resumed epoch: 0, iter: 16' in output
    assert 'Iter(train) [20/20]' in output


@pytest.mark.slow
def test_batch_norm_is_not_synchronised_and_the_log_says_so(folder):
    settings = ['--cfg-options', 'model.norm=sync', 'train_cfg.max_iters=2']
    output = train(config(folder), folder / 'batch_norm', *settings, processes=2)
    assert 'batch norm is not synchronised' in output
    output = train(config(folder), folder / 'batch_norm_1', *settings)
    assert 'will be automatically reverted to BatchNormXd' in output  # mmengine's own words


def refusal(launcher: str, folder) -> str:
    command = [environment()['PYTHON'], ROOT / 'tools/train.py', config(folder)]
    command += ['--work-dir', folder / 'refused', '--launcher', launcher]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert result.returncode == 1 and 'Traceback' not in result.stderr
    return result.stderr.splitlines()[-1]


def test_a_launcher_that_did_not_start_the_process_is_refused(folder):
    assert 'RANK is not set. Start them with tools/dist_train.sh' in refusal('pytorch', folder)


@pytest.mark.parametrize('launcher', ['slurm', 'mpi'])
def test_other_launchers_need_a_gpu(folder, launcher):
    message = refusal(launcher, folder)
    assert f'--launcher {launcher} needs a GPU' in message and 'torchrun' in message
