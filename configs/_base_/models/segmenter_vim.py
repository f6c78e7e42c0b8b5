# Segmenter's mask transformer with two layers on the last map of Vim-Ti.
_base_ = './upernet_vim.py'
embed_dims = 192
model = dict(
    backbone=dict(out_indices=-1),
    neck=None,
    decode_head=dict(
        _delete_=True,
        type='SegmenterMaskTransformerHead',
        in_channels=embed_dims,
        channels=embed_dims,
        embed_dims=embed_dims,
        num_layers=2,
        num_heads=3,
        num_classes=150,
        dropout_ratio=0.0,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
    auxiliary_head=None)
