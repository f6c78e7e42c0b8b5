# What the directions of the scan bring to dense prediction: a small Vision Mamba and one linear layer,
# so that only the scans see more than a patch, on shapes that colour does not tell apart.
# tools/analysis_tools/ablate_directions.py trains it; docs/ablations.md has the result.
_base_ = './vim-demo_upernet_shapes-128x128.py'

embed_dims = 64
model = dict(
    data_preprocessor=dict(size=(96, 96)),
    backbone=dict(
        arch=dict(embed_dims=embed_dims), img_size=96, patch_size=6, directions='ssm_conv', out_indices=-1),
    neck=None,
    decode_head=dict(
        _delete_=True,
        type='FCNHead',
        in_channels=embed_dims,
        channels=embed_dims,
        num_convs=0,
        concat_input=False,
        dropout_ratio=0.0,
        num_classes=7,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
    auxiliary_head=None)
max_iters = 1000
optim_wrapper = dict(optimizer=dict(lr=5e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=20),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=20, end=max_iters),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
default_hooks = dict(checkpoint=dict(interval=max_iters // 4, max_keep_ckpts=1))
train_dataloader = dict(dataset=dict(data_root='data/paired-shapes'))
val_dataloader = dict(dataset=dict(data_root='data/paired-shapes'))
test_dataloader = val_dataloader
