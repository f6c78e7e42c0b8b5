"""The public functions: check the arguments, choose a backend, call it."""
from torch import Tensor

from .backends import choose_backend
from .checks import check_scan


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
                   D: Tensor | None = None, z: Tensor | None = None,
                   delta_bias: Tensor | None = None, delta_softplus: bool = False,
                   return_last_state: bool = False, *, reverse: bool = False,
                   backend: str | None = None) -> Tensor | tuple[Tensor, Tensor]:
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
        backend (str | None): One of :func:`available_backends`; None takes the best one for the
            device of ``u``.

    Returns:
        Tensor | tuple[Tensor, Tensor]: Output (batch, channels, length) in the dtype of ``u``; with
        ``return_last_state`` also the last state (batch, channels, states) in float32 (float64 for
        float64 arguments). Both are differentiable.

    Raises:
        TypeError: An argument is no tensor, not of a real floating dtype, or float64 is mixed with
            other dtypes.
        ValueError: A rank, shape or device does not fit, the groups do not divide the channels, or
            the backend is unknown or cannot run here.
    """
    check_scan(u, delta, A, B, C, D, z, delta_bias)
    chosen = choose_backend(backend, u.device.type)
    out, last_state = chosen.scan(u, delta, A, B, C, D, z, delta_bias, bool(delta_softplus),
                                  bool(reverse))
    return (out, last_state) if return_last_state else out
