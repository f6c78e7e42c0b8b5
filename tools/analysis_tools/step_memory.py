"""Peak memory and time of one step of any config: ``step_memory.py CONFIG``.

Takes the config's model and optimizer and a generated picture of shapes; no data set is needed. The
peak is that of a process of its own, less what it held just before the first step (model and
picture). On the CPU it is what the kernel reports as resident (VmHWM - VmRSS), on a GPU what torch
allocated there. Other systems than Linux do not tell the former.
"""

import argparse
import platform
import time
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.utils import import_modules_from_strings

from mmvim.datasets.samples import generate_batch
from mmvim.utils.launch import ConfigOptions
from mmvim.utils.measure import PeakMemory, mebibytes, processor


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file of mmseg or mmdet')
    parser.add_argument(
        '--mode',
        choices=['train', 'test'],
        default='train',
        help='train: forward, backward and optimizer; test: predictions (default: %(default)s)',
    )
    parser.add_argument('--size', type=int, default=1024, help='image side (default: %(default)s)')
    parser.add_argument('--batch-size', type=int, default=1, help='images (default: %(default)s)')
    parser.add_argument(
        '--steps', type=int, default=2, help='the last is timed (default: %(default)s)'
    )
    parser.add_argument('--cfg-options', nargs='+', action=ConfigOptions, metavar='KEY=VALUE')
    args = parser.parse_args()
    for name in ('size', 'batch_size', 'steps'):
        if getattr(args, name) < 1:
            parser.error(f'--{name.replace("_", "-")} must be positive')
    return args


def main() -> None:
    args = parse_args()
    cfg = Config.fromfile(args.config)
    cfg.merge_from_dict(args.cfg_options or {})
    if cfg.default_scope not in ('mmdet', 'mmseg'):
        raise SystemExit(f'step_memory: no pictures for default_scope={cfg.default_scope!r}')
    import_modules_from_strings(**cfg.custom_imports)
    init_default_scope(cfg.default_scope)
    MMLogger.get_current_instance().setLevel('WARNING')  # how each layer is initialised
    torch.manual_seed(0)
    device, training = get_device(), args.mode == 'train'
    if cfg.default_scope == 'mmseg':
        cfg.model.data_preprocessor.size = (args.size, args.size)
    elif training:
        pads = cfg.model.data_preprocessor.get('batch_augments') or []
        for pad in (pad for pad in pads if pad.type == 'BatchFixedSizePad'):
            pad.size = (args.size, args.size)
    model = MODELS.build(cfg.model).to(device).train(training)
    model.init_weights()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper) if training else None
    batch = generate_batch(cfg.default_scope, args.batch_size, args.size)

    memory = PeakMemory(device)
    before = memory.reset()
    for _ in range(args.steps):
        start = time.perf_counter()
        if training:
            log = model.train_step(batch, wrapper)
        else:
            with torch.no_grad():
                model.test_step(batch)
        if device == 'cuda':
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    peak = None if before is None else memory.peak() - before
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f'{Path(args.config).stem} {args.cfg_options or ""}\n'
        f'{args.mode} step, {args.batch_size} x {args.size} x {args.size}: '
        f'peak {mebibytes(peak)} above {mebibytes(before)}, '
        f'{seconds:.2f} s, {parameters / 1e6:.1f} M parameters\n'
        f'{processor(device)}; torch {torch.__version__}, Python {platform.python_version()}'
    )
    if training:
        print(*(f'{key} {torch.as_tensor(value).item():.3f}' for key, value in log.items()))


if __name__ == '__main__':
    main()
