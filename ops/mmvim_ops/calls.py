"""The arguments of one call by name: what the public functions check and a backend gets."""

from typing import NamedTuple

from torch import Tensor


class Direction(NamedTuple):
    """What one direction of :func:`mmvim_ops.bidirectional_selective_scan` has of its own.

    Shapes and meaning are those of :func:`mmvim_ops.selective_scan`. A plain tuple in this order
    serves, too.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    delta_bias: Tensor | None = None


class ScanCall(NamedTuple):
    """A call of :func:`mmvim_ops.selective_scan`."""

    direction: Direction
    z: Tensor | None
    delta_softplus: bool
    reverse: bool


class BidirectionalCall(NamedTuple):
    """A call of :func:`mmvim_ops.bidirectional_selective_scan`."""

    forward: Direction
    backward: Direction
    z: Tensor | None
    delta_softplus: bool
    scale: float


class SegmentCall(NamedTuple):
    """A call of :func:`mmvim_ops.scan_segment_`; ``out`` and ``state`` are changed in place."""

    out: Tensor
    state: Tensor
    direction: Direction
    z: Tensor | None
    delta_softplus: bool
    reverse: bool
    accumulate: bool
    scale: float


class Conv1dCall(NamedTuple):
    """A call of :func:`mmvim_ops.causal_conv1d`; ``weight`` is (channels, taps)."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    silu: bool
    reverse: bool


class MixerDirection(NamedTuple):
    """The parameters of one scan of :func:`mmvim_ops.mamba_mixer` and how it reads the sequence.

    E are the mixer's inner channels, N the states of each, R the rank of the step size.

    Args:
        conv_weight (Tensor): Depthwise filters, (E, taps) or, as in ``nn.Conv1d``, (E, 1, taps).
        conv_bias (Tensor | None): (E,).
        x_proj_weight (Tensor): (R + 2 N, E); its rows give dt, B and C.
        dt_proj_weight (Tensor): (E, R).
        dt_bias (Tensor): Added to the step size before the softplus, (E,).
        A (Tensor): State matrix, (E, N). Usually < 0.
        D (Tensor | None): Skip connection, (E,).
        reverse (bool): Scan from the last token to the first.
        conv_reverse (bool | None): The convolution sees the tokens behind in place of those before;
            as ``reverse`` if None.
        order (Tensor | None): Permutation of the tokens in which this direction reads them, (L,)
            int64; the result is put back in place. Whether it is one is checked on the CPU only,
            outside of compiled functions and transforms: a GPU would have to be waited for. What
            is no permutation gives wrong results there.
    """

    conv_weight: Tensor
    conv_bias: Tensor | None
    x_proj_weight: Tensor
    dt_proj_weight: Tensor
    dt_bias: Tensor
    A: Tensor
    D: Tensor | None = None
    reverse: bool = False
    conv_reverse: bool | None = None
    order: Tensor | None = None


class MixerCall(NamedTuple):
    """A call of :func:`mmvim_ops.mamba_mixer`."""

    tokens: Tensor
    norm_weight: Tensor | None
    in_weight: Tensor
    in_bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None
    directions: tuple[MixerDirection, ...]
    scale: float
    norm_eps: float
    recompute: str


Call = ScanCall | BidirectionalCall | SegmentCall | Conv1dCall
