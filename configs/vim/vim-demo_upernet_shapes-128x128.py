# The demo: a small Vision Mamba (patch 8, 256 tokens) + UperNet on generated shapes.
# Trains in about a minute on two CPU cores; `make demo` runs it.
_base_ = [
    '../_base_/models/upernet_vim.py', '../_base_/schedules/adamw_scratch_seg.py',
    '../_base_/runtime_seg.py'
]
custom_imports = dict(imports=['mmvim', 'mmvim.datasets'])

embed_dims = 96
num_classes = 7
model = dict(
    data_preprocessor=dict(size=(128, 128)),
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=embed_dims, depth=8),
        img_size=128,
        patch_size=8,
        out_indices=(1, 3, 5, 7)),
    neck=dict(in_channels=embed_dims),
    decode_head=dict(
        in_channels=[embed_dims] * 4, channels=48, dropout_ratio=0.0, num_classes=num_classes),
    auxiliary_head=dict(in_channels=embed_dims, channels=48, num_classes=num_classes))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs')
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs')
]
dataset = dict(type='ShapesDataset', data_root='data/shapes')
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
        pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator

max_iters = 150
optim_wrapper = dict(optimizer=dict(lr=2e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=20),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=20, end=max_iters),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
default_hooks = dict(
    checkpoint=dict(_delete_=True, type='CheckpointHook', by_epoch=False, interval=max_iters))
