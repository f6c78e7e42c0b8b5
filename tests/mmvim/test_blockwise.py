"""Inference in stretches gives the numbers of the whole sequence."""

import pytest
import torch

from mmvim.models import VisionMamba
from mmvim.models.blockwise import Workspace

ARCH = dict(embed_dims=32, depth=4)


def both(monkeypatch, stretch, size=(80, 96), **arguments):
    """Features with gradients enabled (whole) and without (in stretches)."""
    torch.manual_seed(0)
    model = VisionMamba(ARCH, img_size=64, out_indices=(1, 3), **arguments).eval()
    calls = []

    def workspace(hidden):
        calls.append(len(Workspace(hidden, 64, stretch).stretches))
        return Workspace(hidden, 64, stretch)

    x = torch.randn(3, 3, *size)
    whole = [feature.detach() for feature in model(x)]
    monkeypatch.setattr(model, '_workspace', workspace)
    with torch.no_grad():
        return whole, model(x), calls


@pytest.mark.parametrize('stretch', [1, 7, 30, 64, 768])  # 31 tokens, 3 images
@pytest.mark.parametrize('directions', ['ssm_conv', 'ssm', 'sequence', 'none'])
def test_equals_whole(monkeypatch, stretch, directions):
    whole, stretches, calls = both(monkeypatch, stretch, directions=directions)
    assert calls == [max(1, round(31 / stretch))]
    for ours, theirs in zip(stretches, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    'arguments',
    [
        dict(cls_token=None, pos_embed=False),
        dict(cls_token='double', rope=True, rope_residual=True, layer_scale=0.5),
        dict(feature_source='mixer', reduction='sum', norm='layer'),
        dict(out_type='raw', final_norm=False),
    ],
)
def test_equals_whole_in_every_variant(monkeypatch, arguments):
    whole, stretches, _ = both(monkeypatch, 7, **arguments)
    for ours, theirs in zip(stretches, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_when_it_is_done():
    """Only where nothing else is asked for: gradients, training, hooks, half precision."""
    model = VisionMamba(ARCH, img_size=64).eval()
    hidden = torch.randn(1, 17, 32)
    assert model._workspace(hidden) is None
    with torch.inference_mode():
        assert model._workspace(hidden) is not None
        assert model._workspace(hidden.bfloat16()) is None
        with torch.autocast('cpu', torch.bfloat16):
            assert model._workspace(hidden) is None
        assert VisionMamba(ARCH, directions='block').eval()._workspace(hidden) is None
        assert model.train()._workspace(hidden) is None
        seen = []
        hook = model.eval().layers[0].mixer.register_forward_hook(lambda *_: seen.append(1))
        model(torch.randn(1, 3, 64, 64))
        hook.remove()
    assert seen == [1]


def test_leaves_the_input_alone():
    model = VisionMamba(ARCH, img_size=64, cls_token=None, pos_embed=False).eval()
    x = torch.randn(1, 3, 64, 64)
    before = x.clone()
    with torch.inference_mode():
        first, again = model(x)[0], model(x)[0]
    assert torch.equal(x, before)
    assert torch.equal(first, again)
