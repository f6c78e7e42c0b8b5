# DeiT-Ti with its ImageNet weights (docs/data.md) fine-tuned on CamVid: what pre-training brings
# beside the backbones that start from random weights. Data and length are theirs.
_base_ = './deit-nano_upernet_1xb4-2k_camvid-192x256.py'
embed_dims = 192
model = dict(
    backbone=dict(
        arch='tiny',
        patch_size=16,
        out_indices=(3, 7, 11),
        init_cfg=dict(type='Pretrained', checkpoint='data/deit_tiny_patch16_224.pth')),
    neck=dict(in_channels=embed_dims, scales=(4, 2, 1)),  # strides 4, 8, 16
    decode_head=dict(in_channels=[embed_dims] * 3),
    auxiliary_head=dict(in_channels=embed_dims))
optim_wrapper = dict(optimizer=dict(lr=3e-4))
