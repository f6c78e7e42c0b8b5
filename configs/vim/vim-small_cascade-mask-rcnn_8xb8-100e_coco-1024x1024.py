# Vim-S + Cascade Mask R-CNN on COCO, the recipe of the official script.
_base_ = './vim-tiny_cascade-mask-rcnn_8xb8-100e_coco-1024x1024.py'
model = dict(backbone=dict(arch='small'), neck=dict(in_channels=384))
