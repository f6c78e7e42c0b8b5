# The detection demo: a small Vision Mamba (patch 8, 256 tokens) + a small Cascade Mask R-CNN on
# generated shapes in COCO's format. Trains in a few minutes on two CPU cores; `make demo-det` runs it.
_base_ = [
    '../_base_/models/cascade-mask-rcnn_vim.py', '../_base_/schedules/adamw_scratch_det.py',
    '../_base_/runtime_det.py'
]

embed_dims = 96
channels = 48
classes = ('disc', 'square', 'triangle', 'star', 'ring', 'cross')
strides = [4, 8, 16]
roi_extractor = dict(out_channels=channels, featmap_strides=strides, finest_scale=20)
model = dict(
    data_preprocessor=dict(batch_augments=None),
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=embed_dims, depth=8), img_size=128, patch_size=8),
    neck=dict(in_channels=embed_dims, out_channels=channels, scales=(2, 1, 0.5), num_outs=3),
    rpn_head=dict(
        in_channels=channels,
        feat_channels=channels,
        anchor_generator=dict(scales=[6], strides=strides)),
    roi_head=dict(
        bbox_roi_extractor=roi_extractor,
        mask_roi_extractor=roi_extractor,
        bbox_head=[
            dict(
                head,
                in_channels=channels,
                conv_out_channels=channels,
                fc_out_channels=128,
                num_classes=len(classes))
            for head in _base_.model.roi_head.bbox_head
        ],
        mask_head=dict(
            in_channels=channels, conv_out_channels=channels, num_classes=len(classes))),
    train_cfg=dict(
        rpn=dict(allowed_border=0),
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        rcnn=[
            dict(stage, sampler=dict(stage.sampler, num=64)) for stage in _base_.model.train_cfg.rcnn
        ]),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100), rcnn=dict(max_per_img=20)))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackDetInputs')
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(128, 128), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))
]
data_root = 'data/shapes-coco'
dataset = dict(
    type='CheckedCocoDataset',
    data_root=data_root,
    metainfo=dict(
        classes=classes,
        palette=[(230, 57, 70), (38, 110, 240), (46, 168, 84), (255, 200, 40), (165, 80, 225),
                 (40, 205, 215)]))
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        **dataset,
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='train'),
        pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        **dataset,
        ann_file='annotations/instances_val.json',
        data_prefix=dict(img='val'),
        test_mode=True,
        pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(
    type='CocoMetric', ann_file=f'{data_root}/annotations/instances_val.json',
    metric=['bbox', 'segm'])
test_evaluator = val_evaluator

max_iters = 500
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=50, end=max_iters),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
default_hooks = dict(
    logger=dict(interval=20), checkpoint=dict(interval=max_iters, save_best=None))
