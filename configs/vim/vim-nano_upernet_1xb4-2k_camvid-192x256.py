# A Vision Mamba of a million parameters (patch 8, for thin things) + a small UperNet on CamVid,
# from random weights. compare_backbones.py of tools/analysis_tools trains it; docs/results.md.
_base_ = [
    '../_base_/models/upernet_vim.py', '../_base_/datasets/camvid_192x256.py',
    '../_base_/schedules/adamw_scratch_seg.py', '../_base_/runtime_seg.py'
]
embed_dims = 96
channels = 48
num_classes = 11
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(arch='nano', img_size=_base_.crop_size, patch_size=8, out_indices=(3, 7, 11)),
    neck=dict(in_channels=embed_dims, scales=(2, 1, 0.5)),  # strides 4, 8, 16
    decode_head=dict(
        in_channels=[embed_dims] * 3,
        in_index=[0, 1, 2],
        channels=channels,
        num_classes=num_classes,
        loss_decode=dict(_delete_=True, type='ClassWeightedLoss', class_weight=_base_.class_weight)),
    auxiliary_head=dict(
        in_channels=embed_dims,
        in_index=1,
        channels=channels,
        num_classes=num_classes,
        loss_decode=dict(
            _delete_=True,
            type='ClassWeightedLoss',
            class_weight=_base_.class_weight,
            loss_weight=0.4)))
