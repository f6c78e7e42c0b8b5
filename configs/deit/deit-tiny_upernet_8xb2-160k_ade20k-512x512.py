# DeiT-Ti + UperNet on ADE20K: the paper's baseline, everything but the backbone as for Vim-Ti.
_base_ = '../vim/vim-tiny_upernet_8xb2-160k_ade20k-512x512.py'
model = dict(
    backbone=dict(
        _delete_=True, type='DeiT', arch='tiny', img_size=512, out_indices=(2, 5, 8, 11)))
