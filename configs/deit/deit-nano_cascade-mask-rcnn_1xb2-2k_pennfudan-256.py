# A DeiT of a million parameters on Penn-Fudan, everything but the backbone as for Vim. Attention in
# windows of 14 x 14 patches, global in every third block.
_base_ = '../vim/vim-nano_cascade-mask-rcnn_1xb2-2k_pennfudan-256.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='DeiT',
        arch='nano',
        img_size=(256, 320),
        patch_size=8,
        cls_token=None,
        window_size=14,
        global_indices=(2, 5, 8)))
