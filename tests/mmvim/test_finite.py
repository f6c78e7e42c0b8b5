"""A training whose numbers go bad ends with the reason, its weights and checkpoints unharmed."""

from importlib.util import find_spec

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

import mmvim  # noqa: F401  (registers the hook)
from mmvim.engine.finite import all_finite

SCOPES = [scope for scope in ('mmseg', 'mmdet', 'mmpretrain') if find_spec(scope)]


class Toy(BaseModel):
    """Two linear layers whose loss is spoiled in a given iteration."""

    def __init__(self, spoil=lambda model, loss: loss, at: int = 3) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 4), nn.Linear(4, 1)
        self.spoil, self.at, self.iteration = spoil, at, 0

    def forward(self, inputs, mode='loss'):
        self.iteration += 1
        loss = self.second(self.first(inputs.float())).square().mean()
        return {'loss_fit': self.spoil(self, loss) if self.iteration == self.at else loss}


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {'inputs': torch.tensor([1.0, index])}


def train(model: Toy, work_dir, scope: str = SCOPES[0], **optim_wrapper) -> Runner:
    runner = runner_of(model, work_dir, scope, **optim_wrapper)
    runner.train()
    return runner


def runner_of(model: Toy, work_dir, scope: str = SCOPES[0], **optim_wrapper) -> Runner:
    data = dict(
        dataset=Images(),
        sampler=dict(type='DefaultSampler', shuffle=False),
        batch_size=2,
        collate_fn=dict(type='default_collate'),
    )
    return Runner(
        model,
        str(work_dir),
        train_dataloader=data,
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=5),
        optim_wrapper=dict(
            **{'type': 'OptimWrapper', 'optimizer': dict(type='SGD', lr=0.01), **optim_wrapper}
        ),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1)),
        custom_hooks=[dict(type='StopAtNonFiniteHook')],
        default_scope=scope,
        experiment_name=f'{work_dir.name}-{scope}',
    )


def finite(model: nn.Module) -> bool:
    return all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize('scope', SCOPES)
def test_a_loss_that_is_not_a_number_stops_before_the_step(tmp_path, scope):
    model = Toy(lambda model, loss: loss * float('nan'))
    with pytest.raises(FloatingPointError, match='iteration 3.*gradient of first.weight.*of 4'):
        train(model, tmp_path, scope)
    assert finite(model)
    assert sorted(p.name for p in tmp_path.glob('*.pth')) == ['iter_1.pth', 'iter_2.pth']


def test_the_first_bad_parameter_is_named(tmp_path):
    def spoil(model, loss):
        with torch.no_grad():
            model.second.bias.fill_(float('inf'))
        return model.second(model.first(torch.ones(1, 2))).mean()

    with pytest.raises(FloatingPointError, match=r'parameter second.bias is not finite \(the only'):
        train(Toy(spoil), tmp_path)


def test_a_gradient_may_overflow_under_a_finite_loss(tmp_path):
    model = Toy(lambda model, loss: loss + (0 * model.second.bias).sqrt().sum())
    with pytest.raises(FloatingPointError, match=r'gradient of second.bias .*\(the only one\)'):
        train(model, tmp_path, clip_grad=dict(max_norm=1.0))
    assert finite(model)


def test_a_gradient_scaler_may_look_for_its_scale(tmp_path):
    scaled = dict(type='CpuAmpOptimWrapper', dtype='float16')
    model = Toy()
    before = model.second.bias.clone()
    train(model, tmp_path / 'fine', **scaled, loss_scale=dict(init_scale=2.0**126))
    assert finite(model) and torch.equal(model.second.bias, before)  # every step was left out

    with pytest.raises(
        FloatingPointError, match='loss, loss_fit is not finite.*parameters.*finite'
    ):
        train(Toy(lambda model, loss: loss * float('nan')), tmp_path / 'bad', **scaled)


def fail(model, loss):
    raise KeyboardInterrupt


def test_the_optimizer_wrapper_is_left_as_it_was(tmp_path):
    runner = train(Toy(), tmp_path / 'whole')
    assert 'step' not in vars(runner.optim_wrapper)

    runner = runner_of(Toy(lambda model, loss: loss * float('nan')), tmp_path / 'stopped')
    with pytest.raises(FloatingPointError):
        runner.train()
    assert 'step' not in vars(runner.optim_wrapper)


def test_an_interrupted_training_goes_on_with_one_check_a_step(tmp_path, monkeypatch):
    runner = runner_of(Toy(fail), tmp_path)
    for at in (1, 3):  # in the first iteration of two runs
        runner.model.at = at
        with pytest.raises(KeyboardInterrupt):
            runner.train()
        runner.model.iteration = 2
    checks = []
    monkeypatch.setattr('mmvim.engine.finite.all_finite', lambda grads: checks.append(1) or True)
    runner.model.at = 0
    runner.train()
    assert len(checks) == 5 and 'step' not in vars(runner.optim_wrapper)


def test_a_step_of_someone_elses_is_given_back(tmp_path):
    runner = runner_of(Toy(), tmp_path)
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    calls, step = [], runner.optim_wrapper.step

    def counted(**kwargs):
        calls.append(kwargs)
        step(**kwargs)

    runner.optim_wrapper.step = counted
    runner.train()
    assert runner.optim_wrapper.step is counted and len(calls) == 5


def test_many_gradients_are_looked_at_together():
    fine = [torch.rand(3), torch.rand(2, 2).half(), torch.tensor(3e38)]
    assert all_finite(fine) and all_finite([])
    assert not all_finite([*fine, torch.tensor([0.0, float('nan')])])
    assert not all_finite([torch.tensor([float('-inf')]).half(), *fine])
