# Vim-Ti with patches of 8 pixels + UperNet on CamVid, from random weights, on one GPU. Built and
# stepped, not trained to the end.
_base_ = [
    '../_base_/models/upernet_vim.py', '../_base_/datasets/camvid_360x480.py',
    '../_base_/schedules/adamw_scratch_seg.py', '../_base_/runtime_seg.py'
]
embed_dims = 192
num_classes = 11
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(
        img_size=_base_.crop_size, patch_size=8, drop_path_rate=0.1, out_indices=(7, 15, 23)),
    neck=dict(scales=(2, 1, 0.5)),  # strides 4, 8, 16
    decode_head=dict(
        in_channels=[embed_dims] * 3,
        in_index=[0, 1, 2],
        num_classes=num_classes,
        loss_decode=dict(_delete_=True, type='ClassWeightedLoss', class_weight=_base_.class_weight)),
    auxiliary_head=dict(
        in_index=1,
        num_classes=num_classes,
        loss_decode=dict(
            _delete_=True,
            type='ClassWeightedLoss',
            class_weight=_base_.class_weight,
            loss_weight=0.4)))
max_iters = 10000
optim_wrapper = dict(optimizer=dict(lr=5e-4))
param_scheduler = [
    dict(_base_.param_scheduler[0], end=500),
    dict(_base_.param_scheduler[1], begin=500, end=max_iters)
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters // 10)
default_hooks = dict(checkpoint=dict(interval=500))
