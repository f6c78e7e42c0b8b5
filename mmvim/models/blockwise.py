"""A Vim block over a long sequence in inference, a stretch of tokens at a time.

Linear cost is worth little if every layer asks for a dozen tensors as long as the sequence. Here
only four exist, reused by all layers: the residual stream, the hidden states, and the two of a
:class:`Workspace`. Everything else is made for one stretch and stays in the cache; scans hand their
states on from stretch to stretch. The numbers are those of ``VimBlock.forward``.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from mmvim_ops import Direction, scan_block_

from .linear import linear
from .mamba_mixer import MambaMixer

__all__ = ['Workspace', 'run_blockwise']

# Tokens at a time, about: enough for matrix products at full speed, few enough for the cache.
STRETCH = 1024


class Workspace:
    """Memory that layers share: the input of the scans and the sum of their outputs.

    Long sequences are cut; of short ones several are worked through together.

    Args:
        tokens (Tensor): (B, L, C), of which shape, dtype and device are taken.
        inner_dims (int): Channels E of the scans.
        stretch (int): Tokens that are worked through together, about.
    """

    def __init__(self, tokens: Tensor, inner_dims: int, stretch: int = STRETCH) -> None:
        batch, length, _ = tokens.shape
        together = min(batch, max(1, stretch // length))
        self.x = tokens.new_empty(together, length, inner_dims)
        self.y = tokens.new_empty(together, length, inner_dims)
        self.images = [slice(i, min(i + together, batch)) for i in range(0, batch, together)]
        count = max(1, round(length / stretch))
        borders = [length * i // count for i in range(count + 1)]
        self.stretches = [slice(*pair) for pair in pairwise(borders)]


def run_blockwise(
    mixer: MambaMixer, norm: nn.Module, hidden: Tensor, residual: Tensor | None, space: Workspace
) -> tuple[Tensor, Tensor]:
    """``VimBlock.forward`` in evaluation mode; changes ``hidden`` and ``residual`` in place."""
    with torch.no_grad():
        if residual is None:
            residual = hidden.clone()
        else:
            residual.add_(hidden)
        for images in space.images:
            mix_images(mixer, norm, hidden[images], residual[images], space)
    return hidden, residual


def mix_images(
    mixer: MambaMixer, norm: nn.Module, hidden: Tensor, residual: Tensor, space: Workspace
) -> None:
    """Write the mixer's output for the normed residual stream into ``hidden``."""
    x, y = space.x[: len(hidden)], space.y[: len(hidden)]  # (b, L, E)
    in_x, in_z = mixer.in_proj.weight.chunk(2)  # 2 × (E, C)
    for here in space.stretches:
        hidden[:, here] = norm(residual[:, here])  # (b, l, C)
        x[:, here] = linear(hidden[:, here], in_x)  # (b, l, E)
    if mixer.directions != 'none':
        state = new_state(mixer, hidden)
        for here in reversed(space.stretches):
            direction = scan_inputs(mixer, x, here, backward=True)
            out = y[:, here].transpose(1, 2)  # (b, E, l)
            scan_block_(out, state, direction, delta_softplus=True, reverse=True)
    state = new_state(mixer, hidden)
    for here in space.stretches:
        z = linear(hidden[:, here], in_z).transpose(1, 2)  # (b, E, l)
        scan_block_(
            y[:, here].transpose(1, 2),
            state,
            scan_inputs(mixer, x, here),
            z,
            delta_softplus=True,
            accumulate=mixer.directions != 'none',
            scale=mixer.scale,
        )
        out = mixer.out_proj(y[:, here])  # (b, l, C)
        hidden[:, here] = out if mixer.gamma is None else out * mixer.gamma


def new_state(mixer: MambaMixer, tokens: Tensor) -> Tensor:
    """Zeros, (b, E, N)."""
    return tokens.new_zeros(len(tokens), *mixer.A_log.shape)


def scan_inputs(mixer: MambaMixer, x: Tensor, here: slice, backward: bool = False) -> Direction:
    """What a direction reads in one stretch, whose convolution sees some tokens beyond it."""
    taps = mixer.conv1d.weight.shape[-1]
    if backward and mixer.directions == 'ssm_conv':
        stop = min(here.stop + taps - 1, x.shape[1])
        margin, seen = stop - here.stop, slice(here.start, stop)
    else:
        start = max(here.start - taps + 1, 0)
        margin, seen = here.start - start, slice(start, here.stop)
    return mixer.scan_inputs(x[:, seen].transpose(1, 2), backward, margin)
