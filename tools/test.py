"""Test a segmentor, detector or classifier: ``python tools/test.py CONFIG CHECKPOINT``."""

from pathlib import Path

from mmengine.config import Config
from mmengine.evaluator import BaseMetric, DumpResults

import mmvim  # noqa: F401  (registers the models)
from mmvim.engine import FillModelHook, build_runner
from mmvim.utils.data import evaluator_dicts
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
    parser = common_parser('Test a model')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out',
        help='where predictions go: a .pkl file, which the analysis tools of mmdet and mmpretrain '
        "and mmengine's offline evaluation read; for segmentation also a folder of PNG label maps",
    )
    parser.add_argument('--show', action='store_true', help='show predictions in a window')
    parser.add_argument(
        '--show-dir', help='folder for pictures of the ground truth (left) and prediction (right)'
    )
    parser.add_argument('--wait-time', type=float, default=2, help='seconds that --show waits')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    return command_line(parser)


def draw_predictions(cfg: Config, show: bool, show_dir: str | None, wait_time: float) -> None:
    """Turn on the visualisation hook of mmseg, mmdet or mmpretrain for every image."""
    hook = cfg.default_hooks.get('visualization')
    if hook is None:
        raise UserError('--show and --show-dir need a visualization hook in default_hooks')
    hook.update(show=show, wait_time=wait_time)
    if cfg.default_scope == 'mmpretrain':
        hook.update(enable=True, interval=1, out_dir=show_dir)
        return
    hook.update(draw=True, interval=1)
    if show_dir is None:
        return
    show_dir = str(Path(show_dir).absolute())
    if cfg.default_scope == 'mmdet':
        hook.test_out_dir = show_dir
    else:  # mmseg draws through the visualiser's backends
        cfg.visualizer.vis_backends = [dict(type='LocalVisBackend', img_save_dir=show_dir)]


def use_tta(cfg: Config) -> None:
    """Wrap the model and the test pipeline for test-time augmentation."""
    if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
        raise UserError('--tta needs tta_model and tta_pipeline in the config')
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    cfg.model = dict(**cfg.tta_model, module=cfg.model)


def prediction_dump(scope: str, filename: str) -> BaseMetric:
    """The pseudo-metric that pickles all predictions, as compact as the task has one."""
    if scope == 'mmdet':  # stores masks run-length encoded
        from mmdet.evaluation import DumpDetResults

        return DumpDetResults(out_file_path=filename)
    if scope == 'mmseg':
        from mmvim.evaluation import DumpSegResults

        return DumpSegResults(out_file_path=filename)
    return DumpResults(out_file_path=filename)


def write_label_maps(cfg: Config, folder: str) -> None:
    """Let mmseg's IoUMetric write its predictions."""
    metrics = [m for m in evaluator_dicts(cfg.test_evaluator) if type_name(m.type) == 'IoUMetric']
    if not metrics:
        raise UserError(
            f'--out {folder}: label maps are written by an IoUMetric, which test_evaluator lacks; '
            'use a .pkl file'
        )
    metrics[0].output_dir = folder


def main() -> None:
    args = parse_args()
    cfg = load_config(args)
    cfg.load_from = args.checkpoint
    check_data(cfg, 'test_dataloader')
    if args.show or args.show_dir:
        draw_predictions(cfg, args.show, args.show_dir, args.wait_time)
    if args.tta:
        use_tta(cfg)
    pickled = args.out is not None and args.out.endswith(('.pkl', '.pickle'))
    if args.out is not None and not pickled:
        if cfg.default_scope != 'mmseg':
            raise UserError(f'--out must be a .pkl file for {cfg.default_scope}, got {args.out}')
        write_label_maps(cfg, args.out)
    runner = build_runner(cfg)
    runner.register_hook(FillModelHook())
    if pickled:
        runner.test_evaluator.metrics.append(prediction_dump(cfg.default_scope, args.out))
    runner.test()


if __name__ == '__main__':
    run(main)
