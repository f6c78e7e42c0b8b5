"""Stop a training that has become non-finite before it ruins its weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS
from torch import Tensor, nn

__all__ = ['StopAtNonFiniteHook', 'first_non_finite']


@HOOKS.register_module()
class StopAtNonFiniteHook(Hook):
    """Ends the training when a gradient or the loss is not finite, and says where that began.

    Gradients are looked at before every step of an optimizer, and before they are clipped, which
    spreads one that is not finite over all. So the weights are still those from before: with a
    non-finite loss the step would make all of them NaN. A gradient scaler leaves such steps out,
    which is how it finds its scale; there the loss alone decides. The optimizer wrapper has its
    own ``step`` again after every iteration. (mmdet's ``CheckInvalidLossHook`` looks at every 50th
    loss, after the step.)

    Raises:
        FloatingPointError: The message names the iteration and the first parameter that is not
            finite, or else the first such gradient.
    """

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        wrapper = runner.optim_wrapper
        wrappers = wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]
        self._release()  # what an exception in the iteration before has left
        self._steps = [
            CheckedStep(wrapper, partial(self._check_gradients, runner, wrapper))
            for wrapper in wrappers
            if not scales(wrapper)
        ]

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self._release()
        losses = {k: v for k, v in (outputs or {}).items() if 'loss' in k}
        bad = [name for name, value in losses.items() if not torch.isfinite(torch.as_tensor(value))]
        if bad:
            self._stop(runner, f'{", ".join(bad)} is not finite')

    def after_train(self, runner) -> None:
        self._release()

    def _check_gradients(self, runner, wrapper: OptimWrapper) -> None:
        grads = [p.grad for group in wrapper.param_groups for p in group['params']]
        if not all_finite([grad for grad in grads if grad is not None]):
            self._stop(runner, 'a gradient is not finite')

    def _release(self) -> None:
        for step in getattr(self, '_steps', ()):
            step.release()

    def _stop(self, runner, what: str) -> None:
        culprit = first_non_finite(runner.model) or (
            'all parameters are finite, so the forward pass overflowed or the data are at fault'
        )
        raise FloatingPointError(
            f'training stopped at iteration {runner.iter + 1}, as {what}; {culprit}. No checkpoint '
            'was written since. Lower learning rate, clip_grad, --amp bfloat16 instead of float16, '
            "or the backbone's reduction='mean' may help"
        )


class CheckedStep:
    """Takes the place of an optimizer wrapper's ``step`` until it is released, or raises."""

    def __init__(self, wrapper: OptimWrapper, check: Callable[[], None]) -> None:
        self.wrapper, self.check, self.before = wrapper, check, vars(wrapper).get('step')
        self.step = wrapper.step
        wrapper.step = self

    def __call__(self, **kwargs) -> None:
        try:
            self.check()
            self.step(**kwargs)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give the wrapper back what it had."""
        if vars(self.wrapper).get('step') is self:
            del self.wrapper.step
            if self.before is not None:
                self.wrapper.step = self.before


def scales(wrapper: OptimWrapper) -> bool:
    """Whether a gradient scaler leaves out steps that are not finite."""
    scaler = getattr(wrapper, 'loss_scaler', None)
    return scaler is not None and scaler.is_enabled()


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether all numbers are; usually one quick pass and one wait for the device."""
    if not tensors:
        return True
    norms = torch._foreach_norm(tensors)
    if torch.stack([norm.float().to(norms[0].device) for norm in norms]).isfinite().all():
        return True
    return all(tensor.isfinite().all() for tensor in tensors)  # a square may overflow by itself


def first_non_finite(model: nn.Module) -> str | None:
    """The first parameter that is not finite, else the first such gradient, in words."""
    parameters = dict(model.named_parameters())
    for what, tensors in (
        ('parameter', parameters),
        ('gradient of', {name: p.grad for name, p in parameters.items()}),
    ):
        bad = [n for n, t in tensors.items() if t is not None and not t.isfinite().all()]
        if bad:
            count = f'first of {len(bad)}' if len(bad) > 1 else 'the only one'
            return f'{what} {bad[0]} is not finite ({count})'
    return None
