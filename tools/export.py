"""Export a model: ``python tools/export.py CONFIG CHECKPOINT OUT --format onnx``.

Writes a file for ONNX Runtime, torch.export or AOTInductor; docs/deployment.md shows how each is
run.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

import mmvim  # noqa: F401  (registers the models)
from mmvim.apis import load_model
from mmvim.deployment import FORMATS, PARTS, Part, export, load, part_of
from mmvim.utils import guard_checkpoints
from mmvim.utils.launch import ConfigOptions, UserError, add_shape, default_shape, run

TOLERANCE = 1e-4  # of the largest difference, relative to the largest value
REPEATS = 3


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        'out', nargs='?', type=Path, help='file to write (default: the name of the config, here)'
    )
    parser.add_argument('--format', required=True, choices=FORMATS, help='what is written')
    parser.add_argument(
        '--custom-op',
        action='store_true',
        help="with --format onnx: the scans as operators of this project's library, which ONNX "
        'Runtime then needs; faster',
    )
    parser.add_argument(
        '--part',
        choices=PARTS,
        default='model',
        help="'model': a segmentor's logits and labels, a classifier's logits, a detector's "
        "features after the neck; 'backbone': the backbone's maps (default: %(default)s)",
    )
    add_shape(parser)
    parser.add_argument(
        '--batch-size', type=int, default=1, help='pictures in a call (default: %(default)s)'
    )
    parser.add_argument(
        '--dynamic',
        action='store_true',
        help='take any batch size, height and width; --shape and --batch-size are for --verify',
    )
    parser.add_argument(
        '--verify',
        action='store_true',
        help='run the file beside the model: prints the largest differences and the times',
    )
    parser.add_argument('--device', default='cpu', help='default: %(default)s')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=ConfigOptions,
        metavar='KEY=VALUE',
        help='settings to change in the config, such as model.backbone.arch=small',
    )
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='load a checkpoint that is more than weights; code in it will run',
    )
    args = parser.parse_args()
    if args.batch_size < 1:
        parser.error(f'--batch-size must be positive, got {args.batch_size}')
    if args.custom_op and args.format != 'onnx':
        parser.error(f'--custom-op is for --format onnx, got {args.format}')
    if args.out is None:
        args.out = Path(Path(args.config).stem + FORMATS[args.format])
    if args.out.suffix != FORMATS[args.format]:
        parser.error(f'OUT must end in {FORMATS[args.format]} for {args.format}, got {args.out}')
    if args.out.is_dir() or not args.out.parent.is_dir():
        parser.error(f'OUT must be a file in a folder that is there, got {args.out}')
    return args


def seconds(function, images: Tensor) -> float:
    """The shortest of a few calls, after one that is not counted."""
    times = []
    for _ in range(REPEATS + 1):
        if images.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        function(images)
        if images.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def verify(part: Part, exported, images: Tensor) -> None:
    """Print how the outputs of the file differ from the model's, and both times.

    Raises:
        UserError: They differ by more than rounding.
    """
    with torch.no_grad():
        expected = part(images)
        eager = seconds(part, images)
    outputs = exported(images)
    worst = 0.0
    size = ' x '.join(map(str, images.shape))
    for name, ours, theirs in zip(part.names, expected, outputs, strict=True):
        theirs = theirs.to(ours.device)
        if ours.shape != theirs.shape:
            raise UserError(f'{name} has shape {tuple(theirs.shape)}, not {tuple(ours.shape)}')
        if ours.is_floating_point():
            error, largest = (ours - theirs).abs().max().item(), ours.abs().max().item()
            print(f'{size}: {name}: largest difference {error:.1e}, largest value {largest:.3g}')
            # A comparison that NaN does not pass.
            worst = max(worst, error / largest if error <= TOLERANCE * largest else float('inf'))
        else:
            share = (ours != theirs).float().mean().item()
            print(f'{size}: {name}: {share:.3%} differ')
    print(
        f'{size}: {1000 * eager:.1f} ms in PyTorch, '
        f'{1000 * seconds(exported, images):.1f} ms in the file, '
        f'{torch.get_num_threads()} threads'
    )
    if worst > TOLERANCE:
        raise UserError('the file does not compute what the model does')


def main() -> None:
    args = parse_args()
    guard_checkpoints(trust=args.trust_checkpoint)
    model = load_model(args.config, args.checkpoint, args.device, args.cfg_options)
    shape = args.shape or default_shape(model.cfg.default_scope)
    part = part_of(model, args.part)
    start = time.monotonic()
    export(part, args.out, args.format, shape, args.batch_size, args.dynamic, args.custom_op)
    sizes = 'any size' if args.dynamic else f'{args.batch_size} x 3 x {shape[0]} x {shape[1]}'
    print(
        f'wrote {args.out} ({args.out.stat().st_size / 2**20:.1f} MiB) in '
        f'{time.monotonic() - start:.0f} s: images ({sizes}) to {", ".join(part.names)}'
    )
    if args.verify:
        images = torch.rand(args.batch_size, 3, *shape, device=args.device) * 255
        verify(part, load(args.out, args.format, args.custom_op), images)


if __name__ == '__main__':
    run(main)
