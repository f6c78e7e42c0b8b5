# DeiT-Ti + Cascade Mask R-CNN on COCO: the paper's baseline, everything but the backbone as for
# Vim-Ti. Attention in windows of 14 x 14 patches, global in blocks 2, 5, 8 and 11. Relative positions:
# --cfg-options model.backbone.rel_pos=True
_base_ = '../vim/vim-tiny_cascade-mask-rcnn_8xb8-380k_coco-1024x1024.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='DeiT',
        arch='tiny',
        img_size=1024,
        cls_token=None,
        window_size=14,
        global_indices=(2, 5, 8, 11)))
