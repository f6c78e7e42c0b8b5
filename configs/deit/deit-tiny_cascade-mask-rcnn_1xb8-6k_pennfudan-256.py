# DeiT-Ti with patches of 8 pixels on Penn-Fudan, everything but the backbone as for Vim-Ti.
_base_ = '../vim/vim-tiny_cascade-mask-rcnn_1xb8-6k_pennfudan-256.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='DeiT',
        arch='tiny',
        img_size=(256, 320),
        patch_size=8,
        cls_token=None,
        window_size=14,
        global_indices=(2, 5, 8, 11),
        drop_path_rate=0.1))
