"""Random numbers depend on the position in the training, not on what was drawn before."""

import pickle

import pytest
import torch
from mmengine.dataset import DefaultSampler
from mmengine.runner import Runner
from tiny_training import equal, runner

from mmvim.engine import reproducible
from mmvim.engine.reproducible import seed_samples

FIXED = {'randomness': dict(seed=7)}
EPOCHS = {
    'train_cfg': dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=4),
    'train_dataloader.sampler.type': 'DefaultSampler',
    'default_hooks.checkpoint': dict(by_epoch=True, interval=1),
    **FIXED,
}


def loader(infinite: bool = True, **settings):
    sampler = dict(type='InfiniteSampler' if infinite else 'DefaultSampler', shuffle=True)
    cfg = dict(dataset=dict(type='TinyDataset'), sampler=sampler, num_workers=0, batch_size=4)
    return Runner.build_dataloader(seed_samples({**cfg, **settings}, seed=3), seed=3)


def batches(count: int = 5, **settings) -> list[torch.Tensor]:
    iterator = iter(loader(**settings))
    return [torch.stack(next(iterator)['inputs']) for _ in range(count)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def test_samples_do_not_depend_on_workers_or_on_what_was_drawn_before():
    expected = batches()
    torch.rand(5)
    assert same(batches(), expected)
    assert same(batches(num_workers=2), expected)


def test_samples_differ():
    pictures = torch.cat(batches(12))  # more than once through the data
    assert len(pictures.flatten(1).unique(dim=0)) == len(pictures)


def test_epochs_differ_and_are_repeated_by_their_number():
    made = loader(infinite=False)

    def epoch(number: int) -> list[torch.Tensor]:
        made.sampler.set_epoch(number)
        return [torch.stack(batch['inputs']) for batch in made]

    first, second = epoch(0), epoch(1)
    assert not same(first, second)
    assert same(epoch(1), second)


def test_two_processes_draw_what_one_draws(monkeypatch):
    expected = batches(batch_size=8)
    halves = []
    for rank in range(2):
        for module in (reproducible, __import__('mmengine').dataset.sampler):
            monkeypatch.setattr(module, 'get_dist_info', lambda rank=rank: (rank, 2))
        halves.append(batches(batch_size=4))
    together = [torch.stack([a, b], 1).flatten(0, 1) for a, b in zip(*halves, strict=True)]
    assert same(together, expected)


def test_the_wrapped_data_set_and_sampler_are_seen_through():
    made = loader(infinite=False)
    assert made.dataset.metainfo == dict(classes=('a', 'b'))
    assert len(made.dataset) == 21 and len(made.sampler) == 21
    assert made.sampler.seed == 3 and made.sampler.dataset is made.dataset
    assert isinstance(made.sampler.sampler, DefaultSampler)
    copy = pickle.loads(pickle.dumps(made.dataset))  # as workers that are not forked get it
    assert copy.metainfo == made.dataset.metainfo


def test_a_dataloader_that_is_built_already_stays_as_it_is():
    made = loader()
    assert seed_samples(made, seed=0) is made


@pytest.mark.parametrize(('workers', 'interrupted'), [(0, 2), (0, 4), (1, 4)])
def test_a_resumed_training_of_iterations_ends_bit_equal(tmp_path, workers, interrupted):
    settings = {'train_dataloader.num_workers': workers, **FIXED}
    expected = runner(tmp_path / 'undisturbed', {'train_cfg.max_iters': 8, **settings}).train()
    runner(tmp_path / 'run', {'train_cfg.max_iters': interrupted, **settings}).train()
    torch.rand(5)
    resumed = {'train_cfg.max_iters': 8, 'resume': 'auto', **settings}
    assert equal(runner(tmp_path / 'run', resumed).train().state_dict(), expected.state_dict())


@pytest.mark.parametrize('loading', [dict(num_workers=0), dict(num_workers=1)])
def test_a_resumed_training_of_epochs_ends_bit_equal(tmp_path, loading):
    loading = dict(loading, persistent_workers=loading['num_workers'] > 0)
    settings = {**EPOCHS, **{f'train_dataloader.{key}': v for key, v in loading.items()}}
    expected = runner(tmp_path / 'undisturbed', settings).train()
    runner(tmp_path / 'run', {**settings, 'train_cfg.max_epochs': 2}).train()
    torch.rand(5)
    resumed = runner(tmp_path / 'run', {**settings, 'resume': 'auto'}).train()
    assert equal(resumed.state_dict(), expected.state_dict())


def test_an_unseeded_training_is_resumed_with_its_seed(tmp_path):
    first = runner(tmp_path, {'train_cfg.max_iters': 2})
    first.train()
    second = runner(tmp_path, {'train_cfg.max_iters': 4, 'resume': 'auto'})
    second.train()
    assert second.seed == first.seed
