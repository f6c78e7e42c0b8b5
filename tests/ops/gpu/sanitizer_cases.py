"""Small calls of backend 'cuda' without pytest, for compute-sanitizer:

    compute-sanitizer --tool memcheck python tests/ops/gpu/sanitizer_cases.py

and racecheck, initcheck, synccheck in place of memcheck. Each case runs forward and backward over
several chunks and says what it is; names on the command line choose among them. With
MMVIM_TEST_EMULATED=1 they run in the emulation, without a GPU.

All that our kernels read comes from the CPU or from our kernels: where the tool looks at these
alone, initcheck does not see what torch's kernels write.
"""

import os
import sys
from pathlib import Path

if __name__ == '__main__':
    # Every tensor is an allocation of its own, so that reading past one does not stay unseen.
    os.environ.setdefault('PYTORCH_NO_CUDA_MEMORY_CACHING', '1')
    ROOT = Path(__file__).resolve().parents[3]
    sys.path[:0] = [str(ROOT / p) for p in ('ops', 'tests/ops', 'tests/ops/cuda_emulation')]

import torch
from scan_cases import TENSORS, make_arguments, map_tensors, relative_error

from mmvim_ops import Direction, bidirectional_selective_scan, causal_conv1d, selective_scan
from mmvim_ops.backends import BACKENDS
from mmvim_ops.backends.cuda import library
from mmvim_ops.backends.cuda.conv1d import conv1d_pair

STEPS = 5 * 64 + 9  # the last segment is short


def compare(function, tensors):
    """Forward and backward by the kernels and by plain PyTorch."""
    found = []
    for backend in ('cuda', 'torch'):
        leaves = map_tensors(lambda x: x.detach().requires_grad_(), tensors)
        out = function(*leaves, backend=backend)
        grad = (out.detach().cpu() * 0.1).to(out.device)
        grads = torch.autograd.grad(out, [x for x in leaves if x is not None], grad)
        found.append([out, *grads])
    assert_same(*found)


def assert_same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        error = relative_error(one.detach().cpu(), other.detach().cpu())
        assert error < (1e-4 if ours[0].dtype == torch.float32 else 2e-2), error


def scan(device, *, reverse=False, **fixed):
    arguments = make_arguments(2, 37, STEPS, **fixed)
    tensors = [None if (x := arguments[name]) is None else x.to(device) for name in TENSORS]

    def function(*given, backend):
        return selective_scan(*given, delta_softplus=True, reverse=reverse, backend=backend)

    compare(function, tensors)


def both(device, **fixed):
    arguments = make_arguments(1, 40, STEPS, groups_B=0, groups_C=0, **fixed)
    u, delta, A, B, C, D, z, bias = (arguments[name].to(device) for name in TENSORS)
    other_A = (2 * arguments['A']).to(device)

    def function(*given, backend):
        *direction, other_A, z = given
        forward = Direction(*direction)
        return bidirectional_selective_scan(
            forward, forward._replace(A=other_A), z, True, scale=0.5, backend=backend
        )

    compare(function, [u, delta, A, B, C, D, bias, other_A, z])


def filters(device, channels, taps, seed=0):
    torch.manual_seed(seed)
    return torch.randn(channels, taps).to(device), torch.randn(channels).to(device)


def image(device, channels, dtype):
    """(B, D, L), channels next to each other."""
    torch.manual_seed(1)
    return torch.randn(2, 150, channels, dtype=dtype).to(device).mT


def convolution(device, taps, reverse, dtype, channels=37):
    def function(*given, backend):
        return causal_conv1d(*given, reverse=reverse, backend=backend)

    compare(function, [image(device, channels, dtype), *filters(device, channels, taps)])


def two_convolutions(device, dtype):
    """Of one image, in one launch."""
    x = image(device, 72, dtype)
    both = [(*filters(device, 72, 4, seed), bool(seed)) for seed in (0, 1)]
    expected = [
        causal_conv1d(x, weight, bias, reverse=reverse, backend='torch')
        for weight, bias, reverse in both
    ]
    assert_same(conv1d_pair(x, *both, silu=True), expected)


CASES = {
    'scan': lambda device: scan(device, states=16, groups_B=0, groups_C=0, channels_last=True),
    'reverse scan without gate': lambda device: scan(
        device, reverse=True, states=5, groups_B=0, groups_C=0, gate=False
    ),
    'scan with constant B and many states': lambda device: scan(device, states=70, groups_B=None),
    'scan in bfloat16': lambda device: scan(
        device, states=16, groups_B=0, groups_C=0, dtype=torch.bfloat16
    ),
    'both directions': lambda device: both(device, states=16, channels_last=True),
    'both directions in float16': lambda device: both(device, states=9, dtype=torch.float16),
    'convolution': lambda device: convolution(device, 4, False, torch.float32),
    'reverse convolution in bfloat16': lambda device: convolution(device, 7, True, torch.bfloat16),
    'convolution in words': lambda device: convolution(device, 4, False, torch.float32, 72),
    'reverse convolution in words of bfloat16': lambda device: convolution(
        device, 4, True, torch.bfloat16, 72
    ),
    'two convolutions': lambda device: two_convolutions(device, torch.float32),
    'two convolutions in float16': lambda device: two_convolutions(device, torch.float16),
}


def main(names: list[str]) -> None:
    device = 'cuda'
    if os.environ.get('MMVIM_TEST_EMULATED') == '1':
        from build_emulation import build

        device = 'cpu'
        BACKENDS['cuda'].device_types = ('cpu', 'cuda')
        library.emulate(build())
    for name in names or CASES:
        CASES[name](device)
        print(f'{name}: right', flush=True)


if __name__ == '__main__':
    main(sys.argv[1:])
