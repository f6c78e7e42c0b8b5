"""How a scan is cut into blocks and chunks, from a model of what its kernels cost.

No torch here: sizes in, numbers out.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from .structures import SEGMENT

# Fitted to cuts measured on an H100 (docs/data/h100-cuts.json, docs/ops.md): over eight sizes, what
# the model chooses takes 2.5 % more time forward on average than the best cut that was measured.

# Cycles of a scheduler for one step of a warp, by lanes per channel; not fitted for 16 and 32.
CYCLES = {False: {2: 46, 4: 32, 8: 29, 16: 36, 32: 60}, True: {4: 148, 8: 81, 16: 148, 32: 260}}
FIRST_PASS = {False: 0.3, True: 0.2}  # of them, what chunk_ends takes again
# Warps that a scheduler has at once.
RESIDENT = {False: {2: 2, 4: 3, 8: 3, 16: 3, 32: 3}, True: {4: 2, 8: 3, 16: 1, 32: 1}}
LATENCY = 0.3  # of a step: what is waited for in vain, once per set of resident warps
LAUNCHES = 6000  # cycles that two more kernels take to start and end
CARRY = 500  # cycles to go from chunk to chunk
BYTES = 1500  # of the GPU's memory per cycle


class Sizes(NamedTuple):
    """What of a call the cut depends on."""

    directions: int
    batch: int
    groups: int
    per_group: int  # channels
    length: int
    states: int


class Device(NamedTuple):
    processors: int
    shared_bytes: int  # that a block may have


class Cut(NamedTuple):
    """Lanes that share a channel, warps of a block per direction, chunks of the length."""

    lanes: int
    warps: int
    chunks: int


def lanes_for(states: int, backward: bool) -> tuple[int, ...]:
    few = (4, 8) if backward else (2, 4, 8)
    return few if states <= 16 else (16,) if states <= 64 else (32,)


def split_channels(cut: Cut, sizes: Sizes) -> int:
    """Rows that backward's sums over channels get: for B and C together at most twice the size of
    u."""
    blocks = math.ceil(sizes.per_group / (cut.warps * (32 // cut.lanes)))
    return min(blocks, max(1, sizes.per_group // sizes.states))


def cost(cut: Cut, sizes: Sizes, device: Device, backward: bool) -> float:
    """Cycles, by estimate."""
    blocks = math.ceil(sizes.per_group / (cut.warps * (32 // cut.lanes)))  # of a group
    rounds, traffic = 1, 0.0  # sets of channels that a block takes in turn
    if backward:
        splits = split_channels(cut, sizes)
        rounds, blocks = math.ceil(blocks / splits), splits
        elements = sizes.directions * sizes.batch * sizes.groups * sizes.length * sizes.states
        traffic = elements * splits * 2 * 4 * 2 / BYTES
    blocks *= sizes.batch * cut.chunks * sizes.groups
    # Of the busiest multiprocessor, per scheduler.
    warps = math.ceil(blocks / device.processors) * cut.warps * sizes.directions / 4
    sets = math.ceil(warps / RESIDENT[backward][cut.lanes])
    cycles = CYCLES[backward][cut.lanes] * (max(warps, 1) + LATENCY * sets) * rounds
    steps = math.ceil(sizes.length / (cut.chunks * SEGMENT)) * SEGMENT
    if cut.chunks == 1:
        return cycles * steps + traffic
    states = sizes.directions * sizes.batch * sizes.groups * sizes.per_group * sizes.states
    between = cut.chunks * (CARRY + states * 4 * 3 / BYTES) + LAUNCHES
    return cycles * steps * (1 + FIRST_PASS[backward]) + traffic + between


def chunk_counts(length: int) -> list[int]:
    """How many chunks are worth a try: 1, and more that have two segments or more each."""
    segments = math.ceil(length / SEGMENT)
    more = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    return [1, *(chunks for chunks in more if chunks <= segments // 2)]


def candidates(
    sizes: Sizes,
    device: Device,
    backward: bool,
    counts: Iterable[int],
    shared_bytes: Callable[[int, int], int],
    most_threads: Callable[[int], int],
) -> Iterator[Cut]:
    """Cuts into one of ``counts`` chunks whose blocks the device can run."""
    for lanes in lanes_for(sizes.states, backward):
        for warps in (1, 2, 3, 4, 6, 8):
            needed = math.ceil(sizes.per_group / (32 // lanes))  # warps for all channels
            if warps > max(1, needed) or warps * sizes.directions * 32 > most_threads(lanes):
                continue
            if shared_bytes(lanes, warps) <= device.shared_bytes:
                yield from (Cut(lanes, warps, chunks) for chunks in counts)


def choose(
    sizes: Sizes,
    device: Device,
    backward: bool,
    shared_bytes: Callable[[int, int, bool], int],
    most_threads: Callable[[int, bool], int],
) -> Cut:
    """The cheapest cut for one of the passes.

    Backward has as many chunks as forward. It starts from the states that forward saved every 64
    steps, counted in a chunk from the end at which the direction enters it, so of a reversed
    direction they lie elsewhere when chunks end elsewhere.

    Args:
        sizes (Sizes): Of the call.
        device (Device): Where it runs.
        backward (bool): Which pass.
        shared_bytes (Callable): What a block has, of lanes, warps and the pass.
        most_threads (Callable): Of a block, of lanes and the pass.

    Raises:
        RuntimeError: No block fits into the device's shared memory.
    """

    def cheapest(backward: bool, counts: Iterable[int]) -> Cut:
        def bytes_here(lanes: int, warps: int) -> int:
            return shared_bytes(lanes, warps, backward)

        def threads_here(lanes: int) -> int:
            return most_threads(lanes, backward)

        possible = list(candidates(sizes, device, backward, counts, bytes_here, threads_here))
        if not possible:
            raise RuntimeError(
                f"mmvim_ops: backend 'cuda' has no block for {sizes.directions} directions of "
                f'{sizes.states} states in {device.shared_bytes} bytes of shared memory'
            )
        return min(possible, key=lambda cut: cost(cut, sizes, device, backward))

    forward = cheapest(False, chunk_counts(sizes.length))
    return cheapest(True, [forward.chunks]) if backward else forward
