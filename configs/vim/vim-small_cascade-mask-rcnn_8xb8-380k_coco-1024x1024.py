# Vim-S + Cascade Mask R-CNN on COCO, the recipe that the paper gives for Vim-Ti.
_base_ = './vim-tiny_cascade-mask-rcnn_8xb8-380k_coco-1024x1024.py'
model = dict(backbone=dict(arch='small'), neck=dict(in_channels=384))
