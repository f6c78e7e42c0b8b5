"""Parameters and FLOPs of any config's model, by part: ``get_flops.py CONFIG --shape H W``.

What one image costs in inference, heads included; no data set and no checkpoint is needed. FLOPs
are two per multiply-add, scans and attention included, nothing for pointwise work; MACs are half of
them. A segmentor is counted for a single crop of this shape. A two-stage detector is given as many
proposals and detections as its test_cfg allows: the most that an image can cost.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData
from torch import Tensor, nn

import mmvim  # noqa: F401  (registers the models)
from mmvim.utils.flops import count_flops_by_module
from mmvim.utils.launch import (
    ConfigOptions,
    UserError,
    add_shape,
    default_shape,
    read_config,
    run,
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file of mmseg, mmdet or mmpretrain')
    add_shape(parser)
    parser.add_argument(
        '--depth', type=int, default=1, help='levels of modules to list (default: %(default)s)'
    )
    parser.add_argument(
        '--device',
        help="where the model runs (default: 'meta', on shapes alone, which takes no time; 'cpu' "
        'for two-stage detectors, whose operators need numbers)',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=ConfigOptions,
        metavar='KEY=VALUE',
        help='settings to change in the config, such as model.backbone.arch=small',
    )
    args = parser.parse_args()
    if args.depth < 1:
        parser.error(f'--depth must be positive, got {args.depth}')
    return args


def build(cfg: Config) -> nn.Module:
    """The model in evaluation mode, as constructed: nothing is loaded."""
    if 'model' not in cfg:
        raise UserError(f'config {cfg.filename} has no model')
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    MMLogger.get_current_instance().setLevel('ERROR')
    if cfg.get('data_preprocessor') is not None:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    try:
        model = MODELS.build(cfg.model)
    except Exception as error:
        raise UserError(
            f'the model of {cfg.filename} cannot be built: {type(error).__name__}: {error}'
        ) from error
    return revert_sync_batchnorm(model).eval()


def boxes(count: int, like: Tensor) -> InstanceData:
    """As many boxes, each the whole image."""
    height, width = like.shape[-2:]
    return InstanceData(
        bboxes=like.new_tensor([[0, 0, width, height]]).repeat(count, 1),
        scores=like.new_ones(count),
        labels=like.new_zeros(count, dtype=torch.long),
    )


def fill_stages(model: nn.Module, image: Tensor) -> str:
    """Have a two-stage detector find as much as it may, whatever its weights; says how much."""
    proposals = model.test_cfg.rpn.max_per_img
    detections = model.test_cfg.rcnn.max_per_img

    def propose(features, *_, **__):
        model.rpn_head(features)
        return [boxes(proposals, image)]

    def detect(*_, **__):
        return [boxes(detections, image)]

    heads = model.roi_head.bbox_head
    model.rpn_head.predict = propose
    (heads[-1] if isinstance(heads, nn.ModuleList) else heads).predict_by_feat = detect
    return f'{proposals} proposals, {detections} detections'


def prepare(model: nn.Module, scope: str, shape: tuple[int, int]) -> tuple[dict, str]:
    """What the model's forward takes for an image of this shape, and a description of it."""
    batch = dict(inputs=[torch.randint(256, (3, *shape), dtype=torch.uint8)])
    if scope == 'mmdet':
        from mmdet.structures import DetDataSample

        metainfo = dict(img_shape=shape, ori_shape=shape, scale_factor=(1.0, 1.0), img_id=0)
        batch['data_samples'] = [DetDataSample(metainfo=metainfo)]
    batch = model.data_preprocessor(batch)
    padded = tuple(batch['inputs'].shape[-2:])
    words = f'{shape[0]} x {shape[1]}'
    if padded != shape:
        words += f', padded to {padded[0]} x {padded[1]}'
    if hasattr(model, 'roi_head'):
        return dict(batch, mode='predict'), f'{words}, {fill_stages(model, batch["inputs"])}'
    return dict(batch, mode='tensor'), words


def table(model: nn.Module, flops: dict[str, int], depth: int) -> list[str]:
    """A line for each module down to this depth that has parameters or does something."""
    rows = [('', 'parameters (M)', 'GFLOPs', 'GMACs', '% of FLOPs')]
    for name, module in [*model.named_modules(), ('', model)][1:]:  # the total comes last
        parameters = sum(parameter.numel() for parameter in module.parameters())
        count = flops.get(name, 0)
        level = name.count('.')
        if level < depth and (parameters or count):
            label = '  ' * level + name.rpartition('.')[2] if name else 'total'
            cells = [f'{parameters / 1e6:.3f}', '-', '-', '-']  # not run: for training only
            if count:
                share = 100 * count / flops['']
                cells[1:] = f'{count / 1e9:.4f}', f'{count / 2e9:.4f}', f'{share:.1f}'
            rows.append((label, *cells))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        '  '.join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]


def main() -> None:
    args = parse_args()
    cfg = read_config(args.config, args.cfg_options)
    scope = cfg.get('default_scope', 'mmengine')
    shape = args.shape or default_shape(scope)
    model = build(cfg)
    model = model.to(args.device or ('cpu' if hasattr(model, 'roi_head') else 'meta'))
    with torch.no_grad():
        inputs, words = prepare(model, scope, shape)
        flops = count_flops_by_module(model, partial(model, **inputs))
    print(f'{Path(args.config).stem}: {words}')
    print(*table(model, flops, args.depth), sep='\n')


if __name__ == '__main__':
    run(main)
