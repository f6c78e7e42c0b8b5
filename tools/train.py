"""Train a segmentor, detector or classifier: ``python tools/train.py CONFIG``."""

from mmengine.config import Config
from mmengine.device import get_device

import mmvim  # noqa: F401  (registers the models)
from mmvim.engine import build_runner
from mmvim.utils.launch import (
    UserError,
    check_data,
    command_line,
    common_parser,
    load_config,
    run,
    type_name,
)


def parse_args():
    parser = common_parser('Train a model')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='continue from this checkpoint; without a value, from the newest '
        'one in the work dir that is whole',
    )
    parser.add_argument(
        '--amp',
        nargs='?',
        const='default',
        choices=['default', 'bfloat16', 'float16'],
        help='train with automatic mixed precision; without a value, float16 on a GPU and bfloat16 '
        'on a CPU',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate with the batch size, as auto_scale_lr of the config says',
    )
    parser.add_argument('--no-validate', action='store_true', help='do not validate while training')
    return command_line(parser)


def use_amp(cfg: Config, dtype: str) -> None:
    """Replace the plain optimizer wrapper by the one for mixed precision on this device."""
    kind = type_name(cfg.optim_wrapper.get('type', 'OptimWrapper'))
    if kind not in ('OptimWrapper', 'AmpOptimWrapper', 'CpuAmpOptimWrapper'):
        raise UserError(f'--amp works with an OptimWrapper, optim_wrapper.type is {kind}')
    cfg.optim_wrapper.type = 'CpuAmpOptimWrapper' if get_device() == 'cpu' else 'AmpOptimWrapper'
    scale = cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if isinstance(scale, int):  # mmengine takes floats only
        cfg.optim_wrapper.loss_scale = float(scale)
    if dtype != 'default':
        cfg.optim_wrapper.dtype = dtype


def resume_from(cfg: Config, checkpoint: str) -> None:
    """Continue a training from a file, or from the newest in the work dir (``'auto'``)."""
    if checkpoint == 'auto' and 'runner_type' not in cfg:
        cfg.resume = 'auto'  # keeps load_from for a training that has no checkpoint yet
    else:
        cfg.resume = True
        cfg.load_from = None if checkpoint == 'auto' else checkpoint


def main() -> None:
    args = parse_args()
    cfg = load_config(args)
    if args.amp is not None:
        use_amp(cfg, args.amp)
    if args.auto_scale_lr:
        if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
            raise UserError('--auto-scale-lr needs auto_scale_lr.base_batch_size in the config')
        cfg.auto_scale_lr.enable = True
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if args.resume is not None:
        resume_from(cfg, args.resume)
    check_data(cfg, 'train_dataloader', 'val_dataloader')
    build_runner(cfg).train()


if __name__ == '__main__':
    run(main)
