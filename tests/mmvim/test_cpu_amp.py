"""Mixed precision on the CPU: half-precision products, full-precision weights, any resumption."""

import pytest
import torch
from mmengine.optim import OptimWrapper
from torch import nn

from mmvim.engine import CpuAmpOptimWrapper


def wrap(model: nn.Module, dtype: str | None, **options) -> OptimWrapper:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    if dtype is None:
        return OptimWrapper(optimizer)
    return CpuAmpOptimWrapper(optimizer=optimizer, dtype=dtype, **options)


def step(model: nn.Module, wrapper: OptimWrapper) -> torch.Tensor:
    """One training step of a line through (1, 2); returns the prediction."""
    with wrapper.optim_context(model):
        out = model(torch.ones(1, 4))
    wrapper.update_params((out.float() - 2).square().mean())
    return out


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_products_are_in_half_and_weights_in_full_precision(dtype):
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    wrapper = wrap(model, dtype, loss_scale=dict(init_scale=64.0), clip_grad=dict(max_norm=1.0))
    outputs = [step(model, wrapper) for _ in range(60)]
    assert outputs[0].dtype == getattr(torch, dtype) and model.weight.dtype == torch.float32
    assert abs(outputs[-1].item() - 2) < 0.2 < abs(outputs[0].item() - 2)


def test_the_scale_is_float16s_alone():
    model = nn.Linear(4, 1)
    assert wrap(model, 'float16').loss_scaler.get_scale() == 65536
    assert wrap(model, 'float16', loss_scale=8.0).loss_scaler.get_scale() == 8
    assert not wrap(model, 'bfloat16').loss_scaler.is_enabled()
    with pytest.raises(ValueError, match="dtype must be one of .*'bfloat16'.* got 'float64'"):
        wrap(model, 'float64')


@pytest.mark.parametrize('scale', [8, 8.0])
def test_a_given_scale_stays(scale):
    model = nn.Linear(4, 1)
    wrapper = wrap(model, 'float16', loss_scale=scale)
    for _ in range(3):
        step(model, wrapper)
        assert wrapper.loss_scaler.get_scale() == 8


@pytest.mark.parametrize(
    ('scale', 'error'),
    [(0, ValueError), (-1.0, ValueError), (float('nan'), ValueError)]
    + [(wrong, TypeError) for wrong in (True, None, '512', 'Dynamic')],
)
def test_scales_that_make_no_sense_are_refused(scale, error):
    with pytest.raises(error, match='loss_scale must be'):
        wrap(nn.Linear(4, 1), 'float16', loss_scale=scale)


@pytest.mark.parametrize('after', ['bfloat16', 'float16', None])
@pytest.mark.parametrize('before', ['bfloat16', 'float16', None])
def test_training_resumes_in_another_precision(before, after):
    model = nn.Linear(4, 1)
    first, second = (wrap(model, dtype, loss_scale=8.0) for dtype in (before, after))
    step(model, first)
    second.load_state_dict(first.state_dict())
    step(model, second)
    assert second.optimizer.state[model.weight]['step'] == 2
