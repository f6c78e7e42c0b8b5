"""Small calls of backend 'cuda' without pytest, for compute-sanitizer:

    compute-sanitizer --tool memcheck python tests/ops/gpu/sanitizer_cases.py

and racecheck, initcheck, synccheck in place of memcheck. Each case runs forward and backward over
several chunks and says what it is; names on the command line choose among them. With
MMVIM_TEST_EMULATED=1 they run in the emulation, without a GPU.

All that is on the GPU comes from the CPU or from our kernels, and what they are compared with is
computed on the CPU: where the tool looks at our kernels alone, initcheck does not see what torch's
write.
"""

import os
import sys
from functools import partial
from pathlib import Path

if __name__ == '__main__':
    # Every tensor is an allocation of its own, so that reading past one does not stay unseen.
    os.environ.setdefault('PYTORCH_NO_CUDA_MEMORY_CACHING', '1')
    ROOT = Path(__file__).resolve().parents[3]
    sys.path[:0] = [str(ROOT / p) for p in ('ops', 'tests/ops', 'tests/ops/cuda_emulation')]

import torch
from scan_cases import TENSORS, make_arguments, map_tensors, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from mmvim_ops import Direction, bidirectional_selective_scan, causal_conv1d, selective_scan
from mmvim_ops.backends import BACKENDS
from mmvim_ops.backends.cuda import library
from mmvim_ops.backends.cuda.conv1d import conv1d_pair

STEPS = 5 * 64 + 9  # the last segment is short


class OnlyOurKernels(TorchDispatchMode):
    """Torch may allocate, view and copy from and to the CPU here, and refuses to compute."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        with self:  # what our operators and those made of others call counts, too
            if function.namespace == 'mmvim_ops':
                key = getattr(torch._C.DispatchKey, arguments[0].device.type.upper())
                return function.redispatch(torch._C.DispatchKeySet(key), *arguments, **keywords)
            result = function.decompose(*arguments, **keywords)
        if result is not NotImplemented:
            return result
        name = function.name().partition('.')[0].partition('::')[2]
        copies = name == '_to_copy' and keywords.get('dtype') in (None, arguments[0].dtype)
        assert copies or function.is_view or 'empty' in name, f'torch would compute {name}'
        return function(*arguments, **keywords)


def results(function, tensors, device):
    """Of forward and backward."""
    leaves = map_tensors(lambda x: x.to(device).detach().requires_grad_(), tensors)
    out = function(*leaves)
    grads = torch.autograd.grad(out, [x for x in leaves if x is not None], out.detach())
    return [x.detach().cpu() for x in (out, *grads)]


def compare(function, tensors, device):
    """The kernels with plain PyTorch."""
    with OnlyOurKernels():
        ours = results(partial(function, backend='cuda'), tensors, device)
    assert_same(ours, results(partial(function, backend='torch'), tensors, 'cpu'))


def assert_same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        error = relative_error(one, other)
        assert error < (1e-4 if ours[0].dtype == torch.float32 else 2e-2), error


def scan(device, *, reverse=False, **fixed):
    arguments = make_arguments(2, 37, STEPS, **fixed)

    def function(*given, backend):
        return selective_scan(*given, delta_softplus=True, reverse=reverse, backend=backend)

    compare(function, [arguments[name] for name in TENSORS], device)


def both(device, **fixed):
    forward, backward = (
        make_arguments(1, 40, STEPS, groups_B=0, groups_C=0, seed=seed, **fixed) for seed in (0, 1)
    )
    tensors = [given[name] for given in (forward, backward) for name in Direction._fields]
    fields = len(Direction._fields)

    def function(*given, backend):
        # No tensor is in both: torch would add up its two gradients.
        *directions, z = given
        return bidirectional_selective_scan(
            Direction(*directions[:fields]),
            Direction(*directions[fields:]),
            *(z, True),
            scale=0.5,
            backend=backend,
        )

    compare(function, [*tensors, forward['z']], device)


def filters(channels, taps, seed=0):
    torch.manual_seed(seed)
    return torch.randn(channels, taps), torch.randn(channels)


def image(channels, dtype):
    """(B, D, L), channels next to each other."""
    torch.manual_seed(1)
    return torch.randn(2, 150, channels, dtype=dtype).mT


def convolution(device, taps, reverse, dtype, channels=37):
    def function(*given, backend):
        return causal_conv1d(*given, reverse=reverse, backend=backend)

    compare(function, [image(channels, dtype), *filters(channels, taps)], device)


def two_convolutions(device, dtype):
    """Of one image, in one launch."""
    x = image(72, dtype)
    both = [(*filters(72, 4, seed), bool(seed)) for seed in (0, 1)]
    with OnlyOurKernels():
        there = map_tensors(lambda x: x.to(device), [x, *both])
        ours = [out.cpu() for out in conv1d_pair(*there, silu=True)]
    expected = [
        causal_conv1d(x, weight, bias, reverse=reverse, backend='torch')
        for weight, bias, reverse in both
    ]
    assert_same(ours, expected)


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
    torch.set_num_threads(1)  # many small operations on the CPU, which threads only delay
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
