# DeiT-Ti with patches of 8 pixels on CamVid, everything but the backbone as for Vim-Ti.
_base_ = '../vim/vim-tiny-short_upernet_1xb16-600_camvid-192x256.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='DeiT',
        arch='tiny',
        img_size=_base_.crop_size,
        patch_size=8,
        cls_token=None,
        drop_path_rate=0.1,
        out_indices=(3, 7, 11)))
