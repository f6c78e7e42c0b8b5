"""Automatic mixed precision on the CPU, which mmengine's wrapper leaves to accelerators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn

__all__ = ['CpuAmpOptimWrapper']


@OPTIM_WRAPPERS.register_module()
class CpuAmpOptimWrapper(AmpOptimWrapper):
    """mmengine's ``AmpOptimWrapper`` for training on the CPU.

    Args:
        loss_scale (str | float | dict): ``'dynamic'``, a fixed scale, or arguments of
            ``GradScaler``; float16 only, as bfloat16 has the range of float32 and needs no scale.
        dtype (str): ``'bfloat16'`` or ``'float16'``. On processors without instructions for it,
            float16 is for checks only: torch's convolutions are then tens of times slower.
        **kwargs: Those of ``OptimWrapper``.

    Raises:
        ValueError: ``dtype`` is another one, or ``loss_scale`` is not positive.
        TypeError: ``loss_scale`` is something else.
    """

    valid_dtypes = ('bfloat16', 'float16')

    def __init__(
        self,
        loss_scale: str | float | dict = 'dynamic',
        dtype: str | torch.dtype = 'bfloat16',
        **kwargs,
    ) -> None:
        dtype = str(dtype).removeprefix('torch.')
        if dtype not in self.valid_dtypes:
            raise ValueError(f'dtype must be one of {self.valid_dtypes}, got {dtype!r}')
        OptimWrapper.__init__(self, **kwargs)  # not the parent's: it refuses the CPU
        self.cast_dtype = getattr(torch, dtype)
        self._scale_update_param = None
        options = {}
        if isinstance(loss_scale, dict):
            options = loss_scale
        elif isinstance(loss_scale, int | float) and not isinstance(loss_scale, bool):
            if not loss_scale > 0:
                raise ValueError(f'loss_scale must be positive, got {loss_scale}')
            self._scale_update_param = float(loss_scale)
            options = {'init_scale': float(loss_scale)}
        elif loss_scale != 'dynamic':
            raise TypeError(f"loss_scale must be 'dynamic', a number or a dict, got {loss_scale!r}")
        self.loss_scaler = torch.amp.GradScaler('cpu', **{'enabled': dtype == 'float16', **options})

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """The forward pass under autocast, and what ``OptimWrapper`` does while accumulating."""
        with OptimWrapper.optim_context(self, model), torch.autocast('cpu', self.cast_dtype):
            yield

    def state_dict(self) -> dict:
        """As the parent's, without the state of a scaler that does nothing, which none can load."""
        state_dict = super().state_dict()
        if not self.loss_scaler.is_enabled():
            del state_dict['loss_scaler']
        return state_dict
