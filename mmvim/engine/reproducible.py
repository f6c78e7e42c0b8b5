"""Random numbers as a function of the position in the training, not of what was drawn before.

mmengine's checkpoints hold no state of random number generators, so a resumed training augments
and drops otherwise than one that was never interrupted. Here every sample and every iteration
starts from a seed made of the run's seed and its own number, as counter-based generators do
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Nothing has to be stored.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np
import torch
from mmengine.dist import get_dist_info, get_rank
from mmengine.hooks import Hook
from mmengine.registry import DATA_SAMPLERS, DATASETS, HOOKS
from torch.utils.data import Dataset, Sampler

__all__ = ['NumberedSampler', 'SeedIterationHook', 'SeededDataset', 'seed_samples']

# First word of every seed: samples and iterations never share one.
SAMPLE, ITERATION = 0, 1


def _seed_generators(words: tuple[int, ...], seed_torch: Callable[[int], object]) -> None:
    """Seed Python's, numpy's and torch's global generators from one sequence of numbers."""
    for_python, for_numpy, low, high = np.random.SeedSequence(words).generate_state(4).tolist()
    random.seed(for_python)
    np.random.seed(for_numpy)
    seed_torch(high << 32 | low)


class _Draw(int):
    """An index into a data set that knows where in the training it was drawn."""

    position: tuple[int, ...]


@DATA_SAMPLERS.register_module()
class NumberedSampler(Sampler):
    """Gives the indices of another sampler their position in the training.

    Positions count over all processes: two processes with batches of 4 draw what one with batches
    of 8 draws, under the same numbers.

    Args:
        dataset (Sized): The data set.
        sampler (dict): Config of the sampler whose indices these are.
        seed (int, optional): Passed on to that sampler.
        sample_seed (int): First word of the samples' seeds.
    """

    def __init__(self, dataset, sampler: dict, seed: int | None, sample_seed: int) -> None:
        self.sampler = DATA_SAMPLERS.build(sampler, default_args=dict(dataset=dataset, seed=seed))
        self.sample_seed = sample_seed
        self.epoch = 0

    def __getattr__(self, name: str):
        if name == 'sampler' or name.startswith('__'):  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self.sampler, name)

    def __iter__(self) -> Iterator[int]:
        rank, processes = get_dist_info()
        for number, index in enumerate(self.sampler):
            draw = _Draw(index)
            draw.position = (self.sample_seed, self.epoch, number * processes + rank)
            yield draw

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if hasattr(self.sampler, 'set_epoch'):
            self.sampler.set_epoch(epoch)


@DATASETS.register_module()
class SeededDataset(Dataset):
    """Seeds the global generators before it loads a sample that :class:`NumberedSampler` drew.

    What an augmentation draws then depends on the sample's position alone, not on the number of
    workers or on whether training was interrupted. Everything else is the wrapped data set's.

    Args:
        dataset (dict): Config of the data set that loads the samples.
    """

    def __init__(self, dataset: dict) -> None:
        self.dataset = DATASETS.build(dataset)

    def __getattr__(self, name: str):
        # Special names are looked up by torch, which would go past the seeding.
        if name == 'dataset' or name.startswith('__'):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, index: int):
        if isinstance(index, _Draw):
            # Samples are loaded on the CPU; the generators of other devices are not touched.
            _seed_generators((SAMPLE, *index.position), torch.default_generator.manual_seed)
        return self.dataset[int(index)]

    def __len__(self) -> int:
        return len(self.dataset)


def seed_samples(dataloader: dict, seed: int) -> dict:
    """The config of a dataloader whose samples are seeded by their position.

    A dataloader that does not say how its data set and sampler are built is returned as it is.
    """
    if not isinstance(dataloader, dict):
        return dataloader
    dataset, sampler = dataloader.get('dataset'), dataloader.get('sampler')
    if not isinstance(dataset, dict) or not isinstance(sampler, dict):
        return dataloader
    return dict(
        dataloader,
        dataset=dict(type=SeededDataset, dataset=dataset),
        sampler=dict(type=NumberedSampler, sampler=sampler, sample_seed=seed),
    )


@HOOKS.register_module()
class SeedIterationHook(Hook):
    """Seeds the generators before every training iteration with the run's seed, the iteration and
    the process, so that dropout and the like are the same in a resumed training."""

    priority = 'VERY_HIGH'

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        _seed_generators((ITERATION, runner.seed, runner.iter, get_rank()), torch.manual_seed)
