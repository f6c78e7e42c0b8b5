# DeiT-nano with four times as many patches, everything but the backbone as for Vim.
_base_ = '../vim/vim-nano-stride4_1xb64-2e_imagenette-96.py'
load_from = 'work_dirs/compare_imagenette_nano/deit_seed0/epoch_10.pth'
model = dict(
    backbone=dict(
        _delete_=True,
        type='DeiT',
        arch='nano',
        img_size=96,
        patch_size=8,
        stride=4,
        out_type='cls_token',
        drop_path_rate=0.0))
