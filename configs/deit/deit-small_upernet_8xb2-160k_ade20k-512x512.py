# DeiT-S + UperNet on ADE20K: the paper's baseline, everything but the backbone as for Vim-S.
_base_ = './deit-tiny_upernet_8xb2-160k_ade20k-512x512.py'
embed_dims = 384
model = dict(
    backbone=dict(arch='small'),
    neck=dict(in_channels=embed_dims),
    decode_head=dict(in_channels=[embed_dims] * 4, channels=embed_dims),
    auxiliary_head=dict(in_channels=embed_dims))
