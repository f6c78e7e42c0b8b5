# Vim-Ti + Cascade Mask R-CNN learns six images of COCO by heart: losses, targets and decoding are
# right if it can. Minutes on two CPU cores; docs/detection.md has the commands and the figures.
# Small images, fewer regions and another schedule; otherwise the model is the full one.
_base_ = './vim-tiny_cascade-mask-rcnn_8xb8-380k_coco-1024x1024.py'
image_size = 256  # of the short side
model = dict(
    data_preprocessor=dict(batch_augments=None),
    backbone=dict(img_size=image_size),
    train_cfg=dict(
        rcnn=[
            dict(stage, sampler=dict(stage.sampler, num=32)) for stage in _base_.model.train_cfg.rcnn
        ]))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='ResizeShortestEdge', scale=image_size),
    dict(type='PackDetInputs')
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeShortestEdge', scale=image_size),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))
]
subset = dict(ann_file='annotations/instances_overfit.json', data_prefix=dict(img='train2017/'))
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(**subset, pipeline=train_pipeline))
val_dataloader = dict(
    num_workers=0, persistent_workers=False, dataset=dict(**subset, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file='data/coco/annotations/instances_overfit.json')
test_evaluator = val_evaluator

optim_wrapper = dict(
    optimizer=dict(lr=6e-4, weight_decay=0.05), clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=30, end=450),
]
train_cfg = dict(max_iters=200, val_interval=200)
default_hooks = dict(
    checkpoint=dict(interval=25, save_best=None, max_keep_ckpts=1), logger=dict(interval=10))
randomness = dict(seed=0)
