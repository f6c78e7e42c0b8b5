"""Sharded models (FSDP) through mmengine's FlexibleRunner, as far as that works."""

import subprocess

import pytest
import torch
from tiny_training import command, config, environment, train, weights

# Full state dicts without offloading: offloading what is on the CPU already ends in a
# segmentation fault of torch 2.13.
RUNNER = """
runner_type = 'FlexibleRunner'
env_cfg = dict(dist_cfg=dict(backend='nccl'))
"""
WHOLE = """
strategy = dict(
    type='DDPStrategy',
    model_wrapper=dict(type='MMDistributedDataParallel', device_ids=None))
"""
SHARDED = """
strategy = dict(
    type='FSDPStrategy',
    model_wrapper=dict(
        type='MMFullyShardedDataParallel', use_orig_params=True, device_id='cpu'),
    state_dict_cfg=dict(
        state_dict_type='FULL_STATE_DICT',
        state_dict_config=dict(
            type='FullStateDictConfig', offload_to_cpu=False, rank0_only=False),
        optim_state_dict_config=dict(
            type='FullOptimStateDictConfig', offload_to_cpu=False, rank0_only=False)))
"""
UNCLIPPED = "optim_wrapper['clip_grad'] = None\noptim_wrapper['type'] = 'OptimWrapper'\n"
PLAIN = ['--cfg-options', 'model.drop_path_rate=0.', 'randomness.seed=0', 'train_cfg.max_iters=4']


@pytest.mark.slow
def test_a_sharded_model_trains_as_a_whole_one(tmp_path):
    sharded = config(tmp_path, 'sharded.py', RUNNER + UNCLIPPED + SHARDED)
    train(sharded, tmp_path / 'sharded', *PLAIN, processes=2)
    whole = config(tmp_path, 'whole.py', RUNNER + UNCLIPPED + WHOLE)
    train(whole, tmp_path / 'whole', *PLAIN, processes=2)
    state = weights(tmp_path / 'whole', 'iter_4.pth')
    for key, value in weights(tmp_path / 'sharded', 'iter_4.pth').items():
        torch.testing.assert_close(value, state[f'module.{key}'], rtol=0, atol=1e-6)


def test_clipping_the_gradients_of_a_sharded_model_is_refused(tmp_path):
    sharded = config(tmp_path, more=RUNNER + SHARDED)
    result = subprocess.run(
        command(sharded, tmp_path / 'run'), env=environment(), capture_output=True, text=True
    )
    assert result.returncode == 1 and 'Traceback' not in result.stderr
    assert 'clip_grad with FSDPStrategy' in result.stderr
