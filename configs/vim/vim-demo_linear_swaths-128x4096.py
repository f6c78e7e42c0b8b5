# A small Vision Mamba and one linear layer on generated maps whose classes depend on marks that are far
# away (tools/dataset_tools/make_swaths.py); docs/large-images.md has the result.
_base_ = [
    '../_base_/models/upernet_vim.py', '../_base_/schedules/adamw_scratch_seg.py',
    '../_base_/runtime_seg.py'
]
custom_imports = dict(imports=['mmvim', 'mmvim.datasets'])

embed_dims = 64
num_classes = 5
size = (128, 4096)
model = dict(
    data_preprocessor=dict(size=size),
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=embed_dims, depth=4),
        img_size=128,
        patch_size=16,
        # Maps are of any size: nothing is to depend on where a place is in them.
        pos_embed=False,
        out_indices=-1),
    neck=None,
    decode_head=dict(
        _delete_=True,
        type='FCNHead',
        in_channels=embed_dims,
        channels=embed_dims,
        num_convs=0,
        concat_input=False,
        dropout_ratio=0.0,
        num_classes=num_classes,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
    auxiliary_head=None)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs')
]
test_pipeline = train_pipeline
dataset = dict(type='SwathsDataset', data_root='data/swaths')
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
        pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator

max_iters = 600
optim_wrapper = dict(optimizer=dict(lr=4e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=20),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=20, end=max_iters),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
default_hooks = dict(
    checkpoint=dict(_delete_=True, type='CheckpointHook', by_epoch=False, interval=max_iters))
