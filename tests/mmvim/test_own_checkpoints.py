"""Checkpoints that mmengine writes while it trains this project's models."""

import copy

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner, load_checkpoint
from mmengine.runner.checkpoint import load_state_dict
from torch import nn

from mmvim import VisionMamba
from mmvim.engine.checkpoint_hook import fit_checkpoint
from mmvim.utils import CheckpointError, load_from_local


class Regressor(BaseModel):
    """A backbone for 32 x 8 patches, and a head."""

    def __init__(self, **args) -> None:
        super().__init__()
        args = {'img_size': (128, 32), 'cls_token': None, **args}
        arch = dict(embed_dims=16, depth=2, d_state=4)
        self.backbone = VisionMamba(arch, patch_size=4, **args)
        self.head = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 1))

    def forward(self, images: list, mode: str = 'tensor'):
        out = self.head(self.backbone(torch.stack(images))[0].mean(dim=(2, 3)))
        return {'loss': out.square().mean()} if mode == 'loss' else out


class Noise(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {'images': torch.rand(3, 128, 32, generator=torch.Generator().manual_seed(index))}


def runner(
    work_dir, iterations: int = 2, model: nn.Module | None = None, hooks=(), **args
) -> Runner:
    return Runner(
        model or Regressor(),
        str(work_dir),
        train_dataloader=dict(batch_size=2, dataset=Noise(), sampler=dict(type='DefaultSampler')),
        train_cfg=dict(by_epoch=False, max_iters=iterations),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01)),
        param_scheduler=[dict(type='LinearLR', by_epoch=False, end=5, start_factor=0.5)],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1)),
        custom_hooks=[dict(type='FitCheckpointHook'), *hooks],
        experiment_name=f'{work_dir.name}-{len(list(work_dir.parent.iterdir()))}-{iterations}',
        randomness=dict(seed=0),
        **args,
    )


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A work dir after two iterations with averaged weights, and what was in memory at the end."""
    work_dir = tmp_path_factory.mktemp('work')
    run = runner(work_dir, hooks=[dict(type='EMAHook', momentum=0.4)])
    run.train()
    (ema,) = (hook.ema_model for hook in run.hooks if type(hook).__name__ == 'EMAHook')
    return work_dir, run, ema.module


def same(state_dict: dict, module: nn.Module) -> bool:
    return all(torch.equal(state_dict[key], value) for key, value in module.state_dict().items())


@pytest.mark.parametrize('guarded', [True, False])
def test_a_training_goes_on_with_its_message_hub(trained, tmp_path, guard, guarded):
    """With the tools' loader, and with mmengine's own, which calls torch.load."""
    work_dir, run, ema = trained
    if guarded:
        guard()
    hooks = [dict(type='EMAHook', momentum=0.4)]
    again = runner(
        tmp_path, hooks=hooks, load_from=str(work_dir / 'iter_2.pth'), resume=True, iterations=3
    )
    again.train_loop  # noqa: B018  (builds what is resumed)
    for hook in again.hooks:
        hook.before_run(again)
    again.load_or_resume()
    assert again.iter == 2 and same(again.model.state_dict(), run.model)
    (averaged,) = (hook.ema_model for hook in again.hooks if type(hook).__name__ == 'EMAHook')
    assert same(averaged.module.state_dict(), ema)
    before = run.message_hub.log_scalars
    after = again.message_hub.log_scalars
    assert set(after) >= {'train/loss', 'train/lr', 'train/time'}
    for key in set(after) & set(before):
        length = len(after[key].data[0])
        assert length >= 2 and type(after[key]) is type(before[key])
        assert (after[key].data[0] == before[key].data[0][:length]).all()
    assert again.message_hub.get_info('iter') == 1
    states = again.optim_wrapper.optimizer.state_dict()['state']
    assert states[0]['step'] == 2 and again.param_schedulers[0].last_step == 2


def test_torch_and_mmengine_read_them_alone(trained):
    work_dir, _, ema = trained
    content = torch.load(work_dir / 'iter_2.pth', weights_only=True)
    assert content['message_hub']['log_scalars']['train/loss'].mean() > 0
    model = Regressor()
    load_checkpoint(model, str(work_dir / 'iter_2.pth'))
    assert same(model.state_dict(), ema)


@pytest.mark.parametrize('weights', [None, 'ema', 'model'])
def test_averages_are_what_state_dict_holds(trained, weights):
    """mmengine's EMAHook puts them there, and what was trained under another name."""
    work_dir, run, ema = trained
    content = load_from_local(str(work_dir / 'iter_2.pth'))
    assert not torch.equal(run.model.head[1].weight, ema.head[1].weight)
    model = Regressor()
    fit_checkpoint(model, content, 'iter_2.pth', weights=weights)
    assert same(content['state_dict'], run.model if weights == 'model' else ema)
    init_cfg = dict(type='Pretrained', checkpoint=str(work_dir / 'iter_2.pth'), weights=weights)
    model = Regressor(init_cfg=init_cfg)
    model.init_weights()
    assert same(model.backbone.state_dict(), (run.model if weights == 'model' else ema).backbone)


def test_the_grid_survives_training_and_loading(trained):
    """32 x 8 patches have the area of 16 x 16."""
    work_dir, _, ema = trained
    content = load_from_local(str(work_dir / 'iter_2.pth'))
    assert content['state_dict']._metadata['backbone']['grid'] == (32, 8)
    square = Regressor(img_size=64)
    untouched = copy.deepcopy(content)
    load_state_dict(square, untouched['state_dict'])  # without a hook
    fit_checkpoint(square, content, 'iter_2.pth')
    assert content['state_dict']._metadata['backbone']['grid'] == (16, 16)
    assert content['state_dict']._metadata['head.0']['version'] == 2
    expected = square.backbone.pos_embed.clone()
    assert not torch.equal(expected, ema.backbone.pos_embed)
    load_state_dict(square, content['state_dict'], strict=True)
    assert torch.equal(square.backbone.pos_embed, expected)


def test_load_from_takes_bands_grid_and_averages_from_its_hook(trained, tmp_path):
    work_dir, run, _ = trained
    hook = dict(type='FitCheckpointHook', bands='zero', weights='model')
    start = Runner(
        Regressor(in_channels=5),
        str(tmp_path),
        load_from=str(work_dir / 'iter_2.pth'),
        custom_hooks=[hook],
        experiment_name=tmp_path.name,
    )
    start.load_or_resume()
    kernels = start.model.backbone.patch_embed.proj.weight
    assert torch.equal(kernels[:, :3], run.model.backbone.patch_embed.proj.weight)
    assert kernels[:, 3:].eq(0).all()

    model = Regressor()
    silent = {'model': dict(run.model.backbone.state_dict())}
    with pytest.raises(CheckpointError, match='may be 32 × 8.* or 16 × 16'):
        fit_checkpoint(model, dict(silent), 'silent.pth')
    fit_checkpoint(model, silent, 'silent.pth', grid=(32, 8))
    assert torch.equal(silent['state_dict']['backbone.pos_embed'], run.model.backbone.pos_embed)


@pytest.mark.parametrize('compiled_file', [True, False])
@pytest.mark.parametrize('compiled_model', [True, False])
def test_compiled_and_wrapped_models_exchange_weights(trained, compiled_file, compiled_model):
    run = trained[1]
    source = torch.compile(run.model) if compiled_file else run.model
    model = Regressor()
    target = torch.compile(model) if compiled_model else model
    content = {'state_dict': source.state_dict(), 'meta': {}}
    assert any('_orig_mod' in key for key in content['state_dict']) == compiled_file
    fit_checkpoint(target, content, 'compiled.pth')
    load_state_dict(target, content['state_dict'], strict=True)
    assert same(model.state_dict(), run.model)


def test_whole_models_inside_of_something_else_are_found(trained):
    run = trained[1]
    entries = {f'net.module.{key}': value for key, value in run.model.state_dict().items()}
    content = {'state_dict': {**entries, 'criterion.weight': torch.rand(1)}}
    fit_checkpoint(Regressor(), content, 'lightning.ckpt', grid=(32, 8))
    assert same(content['state_dict'], run.model)
