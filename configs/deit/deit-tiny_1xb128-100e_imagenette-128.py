# DeiT-Ti with patches of 8 pixels on imagenette, everything but the backbone as for Vim-Ti.
_base_ = '../vim/vim-tiny_1xb128-100e_imagenette-128.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='DeiT',
        arch='tiny',
        img_size=128,
        patch_size=8,
        out_type='cls_token',
        drop_path_rate=0.1))
