# A DeiT of a million parameters on imagenette, everything but the backbone as for Vim.
_base_ = '../vim/vim-nano_1xb64-8e_imagenette-96.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='DeiT',
        arch='nano',
        img_size=96,
        patch_size=8,
        out_type='cls_token',
        drop_path_rate=0.0))
