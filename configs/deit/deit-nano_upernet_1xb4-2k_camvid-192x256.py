# A DeiT of a million parameters on CamVid, everything but the backbone as for Vim.
_base_ = '../vim/vim-nano_upernet_1xb4-2k_camvid-192x256.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='DeiT',
        arch='nano',
        img_size=_base_.crop_size,
        patch_size=8,
        cls_token=None,
        out_indices=(2, 5, 8)))
