"""How backend 'cuda' cuts a scan for a GPU: sizes in, numbers out."""

import math
import random

import pytest

from mmvim_ops.backends.cuda import cut as cuda_cut
from mmvim_ops.backends.cuda.cut import (
    SEGMENT,
    Cut,
    Device,
    Sizes,
    candidates,
    choose,
    chunk_counts,
    cost,
    lanes_for,
    split_channels,
)

H100 = Device(processors=132, shared_bytes=227 * 1024)
SMALL = Device(processors=46, shared_bytes=99 * 1024)
USUAL = Sizes(directions=2, batch=1, groups=1, per_group=384, length=4096, states=16)


class Kernels:
    """What the kernels need, about as the compiled ones do."""

    def __init__(self, sizes: Sizes):
        self.sizes = sizes

    def shared_bytes(self, lanes: int, warps: int, backward: bool) -> int:
        per_warp = 1024 * lanes * (self.sizes.states > 16) + 12 * 1024
        return self.sizes.directions * (8 * 1024 + warps * (per_warp if backward else 1024))

    def most_threads(self, lanes: int, backward: bool) -> int:
        return {4: 256, 8: 384}.get(lanes, 128) if backward else 384

    def choose(self, device: Device, backward: bool) -> Cut:
        return choose(self.sizes, device, backward, self.shared_bytes, self.most_threads)

    def candidates(self, device: Device, backward: bool) -> list[Cut]:
        def shared_bytes(lanes, warps):
            return self.shared_bytes(lanes, warps, backward)

        def most_threads(lanes):
            return self.most_threads(lanes, backward)

        counts = chunk_counts(self.sizes.length)
        return list(candidates(self.sizes, device, backward, counts, shared_bytes, most_threads))


def cut(sizes: Sizes, device: Device = H100, backward: bool = False) -> Cut:
    return Kernels(sizes).choose(device, backward)


def random_sizes(seed: int) -> Sizes:
    pick = random.Random(seed)
    directions = pick.choice([1, 2])
    return Sizes(
        directions,
        batch=pick.choice([1, 2, 8, 64]),
        groups=pick.choice([1, 1, 3]),
        per_group=round(2 ** pick.uniform(0, 11)),
        length=round(2 ** pick.uniform(0, 15)),
        states=pick.randint(1, 64 if directions == 2 else 256),
    )


each_device = pytest.mark.parametrize('device', [H100, SMALL], ids=['large', 'small'])
each_pass = pytest.mark.parametrize('backward', [False, True], ids=['forward', 'backward'])


@each_device
@each_pass
def test_every_block_can_run_on_the_device(backward, device):
    for seed in range(300):
        sizes = random_sizes(seed)
        kernels, chosen = Kernels(sizes), cut(sizes, device, backward)
        assert chosen.lanes in lanes_for(sizes.states, backward)
        assert kernels.shared_bytes(chosen.lanes, chosen.warps, backward) <= device.shared_bytes
        assert chosen.warps * sizes.directions * 32 <= kernels.most_threads(chosen.lanes, backward)


@each_device
def test_both_passes_have_the_same_chunks(device):
    """The saved states of a reversed direction lie elsewhere if chunks end elsewhere."""
    several = 0
    for seed in range(300):
        sizes = random_sizes(seed)
        forward, backward = (cut(sizes, device, which) for which in (False, True))
        assert forward.chunks == backward.chunks, sizes
        several += forward.chunks > 1
    assert several > 10  # else this would show nothing


def test_backward_takes_forward_s_chunks_even_where_others_are_cheaper(monkeypatch):
    monkeypatch.setattr(
        cuda_cut, 'cost', lambda cut, sizes, device, backward: (1, -1)[backward] * cut.chunks
    )
    assert cut(USUAL).chunks == cut(USUAL, backward=True).chunks == 1


def test_forward_takes_the_cheapest_and_backward_the_cheapest_with_its_chunks():
    for seed in range(100):
        sizes = random_sizes(seed)
        forward, backward = cut(sizes), cut(sizes, backward=True)
        for other in Kernels(sizes).candidates(H100, False):
            assert cost(forward, sizes, H100, False) <= cost(other, sizes, H100, False)
        for other in Kernels(sizes).candidates(H100, True):
            if other.chunks == forward.chunks:
                assert cost(backward, sizes, H100, True) <= cost(other, sizes, H100, True)


def test_there_is_one_chunk_where_there_are_enough_warps():
    for length in (100, 1000, 10000):
        assert cut(USUAL._replace(batch=256, per_group=768, length=length)).chunks == 1


def test_few_warps_share_the_length():
    assert cut(USUAL._replace(per_group=8, length=6000)).chunks > 8
    few, many = (cut(USUAL._replace(batch=batch)).chunks for batch in (1, 32))
    assert few > many


def test_a_chunk_is_not_worth_it_below_two_segments():
    assert chunk_counts(1) == chunk_counts(3 * SEGMENT) == [1]
    assert chunk_counts(3 * SEGMENT + 1) == [1, 2]
    for length in (500, 1300, 9999):
        counts = chunk_counts(length)
        assert counts == sorted(set(counts))
        assert max(counts) * 2 <= math.ceil(length / SEGMENT)


@each_pass
def test_blocks_have_no_more_warps_than_there_are_channels_for(backward):
    for channels in (1, 8, 9, 30):
        chosen = cut(USUAL._replace(per_group=channels), backward=backward)
        assert (chosen.warps - 1) * (32 // chosen.lanes) < channels


def test_sums_over_channels_stay_small_and_every_row_has_a_block():
    for seed in range(300):
        sizes = random_sizes(seed)
        chosen = cut(sizes, backward=True)
        splits = split_channels(chosen, sizes)
        assert 1 <= splits <= max(1, sizes.per_group / sizes.states)
        assert (splits - 1) * chosen.warps * (32 // chosen.lanes) < sizes.per_group


@each_pass
@pytest.mark.parametrize('name', ['length', 'batch', 'per_group', 'groups'])
def test_more_work_costs_no_less(name, backward):
    for chosen in (Cut(4, 2, 1), Cut(8, 4, 8)):
        smaller = [USUAL._replace(**{name: getattr(USUAL, name) * n}) for n in (1, 2, 4, 8)]
        costs = [cost(chosen, sizes, H100, backward) for sizes in smaller]
        assert costs == sorted(costs)
        assert costs[-1] > costs[0]


@each_pass
def test_what_fits_into_no_block_is_refused(backward):
    with pytest.raises(RuntimeError, match='2 directions of 16 states in 8192 bytes'):
        cut(USUAL, Device(132, 8192), backward)
