# DeiT-Ti + UperNet on ADE20K: the paper's baseline, everything but the backbone as for Vim-Ti.
# ImageNet weights: convert the official file with mmseg's tools/model_converters/vit2mmseg.py and
# pass --cfg-options model.pretrained=FILE
_base_ = '../vim/vim-tiny_upernet_8xb2-160k_ade20k-512x512.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='VisionTransformer',
        img_size=(512, 512),
        patch_size=16,
        embed_dims=192,
        num_layers=12,
        num_heads=3,
        mlp_ratio=4,
        qkv_bias=True,
        out_indices=(2, 5, 8, 11),
        final_norm=True,
        norm_cfg=dict(type='LN', eps=1e-6),
        interpolate_mode='bicubic'))
