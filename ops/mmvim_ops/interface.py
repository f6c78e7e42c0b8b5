"""The public functions: check the arguments, choose a backend, call it."""

from torch import Tensor

from .backends import choose_backend
from .calls import BidirectionalCall, Conv1dCall, Direction, ScanCall, SegmentCall
from .checks import (
    check_bidirectional_scan,
    check_conv1d,
    check_scan,
    check_segment,
    flag,
    refuse_forward_mode,
)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    reverse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Run a diagonal state space model whose parameters depend on the input.

    For every batch element and channel, with h of N states and h₋₁ = 0,

        Δ_t = softplus(delta_t + delta_bias)
        h_t = exp(Δ_t A) ⊙ h_{t−1} + Δ_t B_t u_t
        y_t = (C_t · h_t + D u_t) · silu(z_t)

    which is the selective scan (S6) of Gu and Dao, "Mamba: Linear-Time Sequence Modeling with
    Selective State Spaces", arXiv:2312.00752, section 3, with A discretised by zero-order hold and
    B by Euler's rule. Without ``delta_softplus``, ``delta_bias``, ``D`` or ``z`` that part is left
    out. Arguments and results are those of ``selective_scan_fn`` in ``mamba_ssm``.

    Any strides are accepted; the (batch, length, channels) layout behind a transposed view is as
    good as the contiguous one, and the output has the memory layout of ``u``. States and all
    arithmetic are float32, or float64 where the arguments are float64. First derivatives are
    available for every tensor argument and from both results; second ones are not.

    Args:
        u (Tensor): Input, (batch, channels, length).
        delta (Tensor): Step size, (batch, channels, length).
        A (Tensor): Real state matrix, one diagonal per channel, (channels, states). Usually < 0.
        B (Tensor): Input matrix, (channels, states), (batch, states, length) or
            (batch, groups, states, length), where each group serves channels / groups neighbouring
            channels.
        C (Tensor): Output matrix, shapes as ``B``.
        D (Tensor | None): Skip connection, (channels,).
        z (Tensor | None): Gate, (batch, channels, length).
        delta_bias (Tensor | None): Added to ``delta`` before the softplus, (channels,).
        delta_softplus (bool): Whether ``delta`` goes through a softplus.
        return_last_state (bool): Whether the state after the last step is returned, too.
        reverse (bool): Run from the last time step to the first: equal to flipping ``u``,
            ``delta``, ``z`` and the time-varying ones of ``B``, ``C`` along the length, scanning
            and flipping the output back. The last state is then the one at time 0.
        backend (str | None): One of :func:`available_backends`, which computes the whole call or
            refuses it. None takes that of :func:`use_backend`, else the best one that takes the
            call.

    Returns:
        Tensor | tuple[Tensor, Tensor]: Output (batch, channels, length) in the dtype of ``u``; with
        ``return_last_state`` also the last state (batch, channels, states) in float32 (float64 for
        float64 arguments). Both are differentiable.

    Raises:
        TypeError: An argument is no tensor, not of a real floating dtype, or float64 is mixed with
            other dtypes.
        ValueError: A rank, shape or device does not fit, the groups do not divide the channels, or
            the backend is unknown, cannot run here, does not take the call, or has failed the check
            of itself that comes before its first call on a GPU.
        NotImplementedError: An argument has a forward-mode derivative.
    """
    check_scan(u, delta, A, B, C, D, z, delta_bias)
    direction = Direction(u, delta, A, B, C, D, delta_bias)
    refuse_forward_mode('selective_scan', *direction, z)
    with_state = flag('return_last_state', return_last_state)
    call = ScanCall(direction, z, flag('delta_softplus', delta_softplus), flag('reverse', reverse))
    out, last_state = choose_backend(backend, u.device, u.dtype, call).scan(call)
    return (out, last_state) if with_state else out


def bidirectional_selective_scan(
    forward: Direction,
    backward: Direction,
    z: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Scan a sequence from both ends, gate both results with ``z`` and add them, in one call.

        out = (y_forward + y_backward) · silu(z) · scale

    where y is :func:`selective_scan` without gate, y_backward with ``reverse=True``: every tensor
    of ``backward`` is in the order of the sequence, nothing is flipped. This is the mixer of Zhu et
    al., "Vision Mamba", arXiv:2401.09417, algorithm 1; its released models have scale 0.5. The two
    directions may share tensors.

    Args:
        forward (Direction): Tensors of the scan from the first time step to the last.
        backward (Direction): Tensors of the scan from the last to the first, of the same sizes.
        z (Tensor | None): Gate of both, (batch, channels, length).
        delta_softplus (bool): Whether ``delta`` of both goes through a softplus.
        scale (float): Factor of the sum.
        backend (str | None): As in :func:`selective_scan`. 'triton' and 'torch' compose it of two
            scans of theirs.

    Returns:
        Tensor: (batch, channels, length), dtype and memory layout of ``forward.u``; differentiable
        once.

    Raises:
        TypeError, ValueError, NotImplementedError: As :func:`selective_scan`; the message says
            which direction. Also where the two directions differ in size, dtype or device of ``u``.
    """
    forward, backward = Direction(*forward), Direction(*backward)
    check_bidirectional_scan(forward, backward, z, scale)
    refuse_forward_mode('bidirectional_selective_scan', *forward, *backward, z)
    softplus = flag('delta_softplus', delta_softplus)
    call = BidirectionalCall(forward, backward, z, softplus, float(scale))
    u = forward.u
    return choose_backend(backend, u.device, u.dtype, call).bidirectional_scan(call)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    reverse: bool = False,
    activation: str | None = 'silu',
    backend: str | None = None,
) -> Tensor:
    """Convolve every channel with its own filter over the present and the past.

        out_t = activation(bias + Σ_k weight_k x_{t − (taps − 1) + k}),    x_t = 0 for t < 0

    as ``nn.Conv1d(channels, channels, taps, groups=channels, padding=taps - 1)`` cut to the length
    of its input. Any strides are accepted, and the output has the memory layout of ``x``.

    Args:
        x (Tensor): Input, (batch, channels, length).
        weight (Tensor): Filters, (channels, taps) or, as in ``nn.Conv1d``, (channels, 1, taps).
        bias (Tensor | None): (channels,).
        reverse (bool): See the future in place of the past: equal to flipping ``x``, convolving and
            flipping back.
        activation (str | None): 'silu' or None.
        backend (str | None): As in :func:`selective_scan`. 'cpp' takes up to 8 taps, 'cuda' 32, the
            others any number.

    Returns:
        Tensor: (batch, channels, length) in the dtype of ``x``; differentiable once.

    Raises:
        TypeError: An argument is no tensor, not of a real floating dtype, or float64 is mixed with
            other dtypes.
        ValueError: A rank, shape or device does not fit, the activation or backend is unknown, or
            the backend does not take the call.
        NotImplementedError: An argument has a forward-mode derivative.
    """
    check_conv1d(x, weight, bias, activation)
    refuse_forward_mode('causal_conv1d', x, weight, bias)
    taps = weight.squeeze(1) if weight.ndim == 3 else weight
    call = Conv1dCall(x, taps, bias, activation == 'silu', flag('reverse', reverse))
    return choose_backend(backend, x.device, x.dtype, call).conv1d(call)


def scan_segment_(
    out: Tensor,
    state: Tensor,
    direction: Direction,
    z: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    reverse: bool = False,
    accumulate: bool = False,
    scale: float = 1.0,
    backend: str | None = None,
) -> None:
    """Go on with a scan over one segment of a sequence, in memory that is there already.

    With y of :func:`selective_scan` over the segment, without gate, that starts from ``state`` in
    place of zeros,

        out ← (y + out) · silu(z) · scale    or, without ``accumulate``,
        out ← y · silu(z) · scale

    and ``state`` becomes the one after the segment's last step (its first one with ``reverse``).
    The segments of a sequence in their order, from a state of zeros, give what the whole sequence
    gives; for ``reverse`` that order is from the last segment to the first. For inference only.

    Args:
        out (Tensor): (batch, channels, length), changed in place; dtype of ``u``, any strides but
            those of an expanded tensor.
        state (Tensor): (batch, channels, states), changed in place; contiguous, float32 (float64
            for float64 arguments).
        direction (Direction): ``u``, ``delta``, A, ``B``, ``C``, ``D`` and ``delta_bias`` of the
            segment.
        z (Tensor | None): Gate, (batch, channels, length).
        delta_softplus (bool): Whether ``delta`` goes through a softplus.
        reverse (bool): Run from the last time step to the first.
        accumulate (bool): Add to what is in ``out``.
        scale (float): Factor of the result.
        backend (str | None): As in :func:`selective_scan`. Only 'cpp' has a kernel for it. The
            others compose it of their scan, with a (batch, channels, states, length) tensor of the
            segment.

    Raises:
        TypeError, ValueError, NotImplementedError: As :func:`selective_scan`; also where ``out`` or
            ``state`` do not fit or a gradient is asked for.
    """
    direction = Direction(*direction)
    u, delta, A, B, C, D, delta_bias = direction
    check_scan(u, delta, A, B, C, D, z, delta_bias)
    check_segment(out, state, direction, z)
    refuse_forward_mode('scan_segment_', out, state, *direction, z)
    call = SegmentCall(
        *(out, state, direction, z, flag('delta_softplus', delta_softplus)),
        *(flag('reverse', reverse), flag('accumulate', accumulate), float(scale)),
    )
    choose_backend(backend, u.device, u.dtype, call).scan_segment_(call)


scan_block_ = scan_segment_  # its former name
