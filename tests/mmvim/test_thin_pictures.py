"""Pictures thinner than two patches go through whole models."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData

import mmvim  # noqa: F401  (registers the models)

CONFIGS = Path(__file__).parents[2] / 'configs/vim'
SIZES = [(5, 100), (100, 5), (31, 40), (1, 1)]


def build(name: str, **backbone):
    cfg = Config.fromfile(CONFIGS / name)
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.arch.depth = 4
    cfg.model.backbone.update(patch_size=16, **backbone)
    if 'rpn_head' in cfg.model:
        cfg.model.train_cfg.rpn.allowed_border = -1  # as the recipes for COCO have it
    return MODELS.build(cfg.model)


def meta(size: tuple[int, int]) -> dict:
    shape = dict(img_shape=size, ori_shape=size, pad_shape=size)
    return dict(shape, scale_factor=(1.0, 1.0), img_path='thin.png')


@pytest.mark.parametrize('size', SIZES)
def test_a_segmentor_labels_every_pixel(size):
    from mmseg.structures import SegDataSample

    model = build('vim-demo_upernet_shapes-128x128.py', out_indices=(0, 1, 2, 3)).eval()
    picture = torch.randint(0, 255, (3, *size), dtype=torch.uint8)
    sample = SegDataSample(metainfo=meta(size))
    found = model.test_step(dict(inputs=[picture], data_samples=[sample]))[0]
    assert found.pred_sem_seg.data.shape == (1, *size)
    assert found.seg_logits.data.isfinite().all()

    # Two of a size, as the batch norm of the 1 x 1 pooling needs them.
    labels = PixelData(data=torch.zeros(1, *size, dtype=torch.long))
    batch = [SegDataSample(metainfo=meta(size), gt_sem_seg=labels) for _ in range(2)]
    model.data_preprocessor.size = None
    model.data_preprocessor.size_divisor = 1
    data = model.train().data_preprocessor(dict(inputs=[picture] * 2, data_samples=batch), True)
    losses = model(**data, mode='loss')
    assert losses['decode.loss_ce'].isfinite()


@pytest.mark.parametrize('path', sorted(CONFIGS.glob('*coco*.py')), ids=lambda path: path.stem)
def test_recipes_for_coco_let_anchors_stick_out(path):
    assert Config.fromfile(path).model.train_cfg.rpn.allowed_border == -1


@pytest.mark.parametrize('size', SIZES[:3])
def test_a_detector_predicts_and_trains(size):
    from mmdet.structures import DetDataSample
    from mmdet.structures.bbox import HorizontalBoxes
    from mmdet.structures.mask import BitmapMasks

    model = build('vim-demo_cascade-mask-rcnn_shapes-128x128.py')
    picture = torch.randint(0, 255, (3, *size), dtype=torch.uint8)
    truth = InstanceData(
        bboxes=HorizontalBoxes(torch.tensor([[0.0, 0, size[1], size[0]]])),
        labels=torch.tensor([1]),
        masks=BitmapMasks(torch.ones(1, *size, dtype=torch.uint8).numpy(), *size),
    )
    nothing = InstanceData(bboxes=torch.empty(0, 4), labels=torch.empty(0, dtype=torch.long))
    sample = DetDataSample(gt_instances=truth, ignored_instances=nothing, metainfo=meta(size))
    found = model.eval().test_step(dict(inputs=[picture], data_samples=[sample.new()]))[0]
    assert found.pred_instances.bboxes.isfinite().all()
    data = model.train().data_preprocessor(dict(inputs=[picture], data_samples=[sample]), True)
    losses = model(**data, mode='loss')
    assert all(torch.as_tensor(value).isfinite().all() for value in losses.values())
