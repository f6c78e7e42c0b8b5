"""Counted FLOPs equal closed forms, written out from the papers."""

import pytest
import torch
from torch import nn

from mmvim.models import DeiT, VisionMamba
from mmvim.utils.flops import count_flops, count_flops_by_module
from mmvim_ops import available_backends, causal_conv1d
from mmvim_ops.backends import BACKENDS

CPU_BACKENDS = [name for name in available_backends() if BACKENDS[name].runs_on('cpu')]
ARCH = dict(embed_dims=32, depth=2)


def patch_embedding(patches, C, patch_size=16):
    return 2 * patches * C * 3 * patch_size**2


def vim_blocks(tokens, C, depth):
    E, N, taps = 2 * C, 16, 4
    dt_rank = -(-C // 16)
    in_proj = tokens * C * 2 * E
    conv1d = tokens * E * taps
    x_proj = tokens * E * (dt_rank + 2 * N)
    dt_proj = tokens * dt_rank * E
    scan = 3 * tokens * E * N + tokens * E * N
    out_proj = tokens * E * C
    directions = 2
    return 2 * depth * (in_proj + directions * (conv1d + x_proj + dt_proj + scan) + out_proj)


def forward(model, *size, device='cpu'):
    """A function that runs the model on one image without gradients."""
    x = torch.randn(1, 3, *size, device=device)

    def run():
        with torch.no_grad():
            model(x)

    return run


def training_step(model, *size):
    x = torch.randn(1, 3, *size)
    return lambda: model(x)[0].sum().backward()


def test_vim_tiny_equals_the_closed_form_in_inference_and_in_training():
    model = VisionMamba('tiny')
    patches, blocks = patch_embedding(196, 192), vim_blocks(197, 192, depth=24)
    assert count_flops(forward(model.eval(), 224, 224)) == patches + blocks
    # A product of two has two gradients; nobody asks for that of the image.
    assert count_flops(training_step(model.train(), 224, 224)) == 2 * patches + 3 * blocks


def test_counting_on_shapes_alone_gives_the_same():
    model = VisionMamba(ARCH).eval()
    counted = count_flops(forward(model, 64, 96))
    assert counted == patch_embedding(24, 32) + vim_blocks(25, 32, depth=2)
    assert count_flops(forward(model.to('meta'), 64, 96, device='meta')) == counted


def test_vim_grows_linearly_and_deit_quadratically():
    def counts(model):
        return [
            count_flops(forward(model, 32, 16 * tokens, device='meta')) for tokens in (8, 16, 24)
        ]

    small, medium, large = counts(VisionMamba(ARCH, cls_token=None).to('meta').eval())
    assert large - medium == medium - small > 0
    small, medium, large = counts(DeiT(dict(ARCH, num_heads=2), cls_token=None).to('meta').eval())
    assert large - medium > medium - small > 0


@pytest.mark.parametrize('attention', ['fused', 'explicit'])
def test_deit_equals_the_closed_form_whatever_computes_the_attention(attention):
    C, depth, M = 32, 2, 16 + 1
    model = DeiT(dict(ARCH, num_heads=2), img_size=64, attention=attention)
    patches = patch_embedding(16, C)
    blocks = 2 * depth * (4 * M * C**2 + 2 * M**2 * C + 8 * M * C**2)
    assert count_flops(forward(model.eval(), 64, 64)) == patches + blocks
    assert count_flops(training_step(model.train(), 64, 64)) == 2 * patches + 3 * blocks


@pytest.mark.parametrize('attention', ['fused', 'explicit'])
def test_masked_windows_count_alike(attention):
    model = DeiT(
        dict(ARCH, num_heads=2),
        cls_token=None,
        attention=attention,
        window_size=3,
        global_indices=[1],
        rel_pos=True,
    )
    windows, M, C = 4, 9, 32  # a grid of 4 x 4 is filled up to 6 x 6
    filled = windows * (4 * M * C**2 + 2 * M**2 * C) + 8 * 16 * C**2
    counted = count_flops_by_module(model, forward(model.eval(), 64, 64))
    positions = windows * M * 2 * 3 * C  # per query, head dimension and row or column of a window
    assert counted['blocks.0'] == 2 * (filled + positions)


@pytest.mark.parametrize('backend', CPU_BACKENDS)
def test_the_backward_pass_of_a_causal_convolution_counts_twice_the_forward(backend):
    x, weight = torch.randn(2, 20, 6).transpose(1, 2).requires_grad_(), torch.randn(6, 4)
    weight.requires_grad_()
    counted = count_flops(lambda: causal_conv1d(x, weight, backend=backend).sum().backward())
    assert counted == 3 * 2 * x.numel() * 4


@pytest.mark.parametrize('groups', [1, 2, 4])
@pytest.mark.parametrize('kind', [nn.Conv2d, nn.ConvTranspose2d])
def test_convolutions_of_torch(kind, groups):
    conv = kind(8, 4, kernel_size=(3, 5), stride=2, groups=groups)
    x = torch.randn(2, 8, 11, 13, requires_grad=True)
    out = conv(x)
    positions = (x if kind is nn.ConvTranspose2d else out)[:, 0].numel()
    one = 2 * positions * (8 // groups) * 4 * 15
    assert count_flops(lambda: conv(x).sum().backward()) == 3 * one
    conv.requires_grad_(False)
    assert count_flops(lambda: conv(x).sum().backward()) == 2 * one


class Pair(nn.Module):
    """Calls one part's ``forward`` itself, another one's inside, and multiplies on its own."""

    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.extra = nn.ModuleDict({'inner': nn.Linear(4, 8)})
        self.unused = nn.Linear(4, 4)

    def forward(self, x):
        self.extra['inner'](self.head.forward(x))
        return self.head[1](x) @ x.T


def test_by_module():
    model, x = Pair(), torch.randn(3, 4)
    counted = count_flops_by_module(model, lambda: model(x))
    linear = 2 * 3 * 4 * 4
    assert counted == {
        'head.0': linear,
        'head.1': 2 * linear,
        'head': 3 * linear,
        'extra': 2 * linear,
        'extra.inner': 2 * linear,
        '': 5 * linear + 2 * 3 * 4 * 3,
    }
    assert count_flops(lambda: model(x)) == counted['']
    assert all('forward' not in vars(module) for module in model.modules())


def test_by_module_leaves_other_replacements_of_forward(monkeypatch):
    model, x = Pair(), torch.randn(3, 4)
    model.unused.forward = replacement = lambda x: x
    count_flops_by_module(model, lambda: model(x))
    assert model.unused.forward is replacement
