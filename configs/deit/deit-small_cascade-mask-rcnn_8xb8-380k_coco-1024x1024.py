# DeiT-S + Cascade Mask R-CNN on COCO: windows and global attention as for DeiT-Ti.
_base_ = './deit-tiny_cascade-mask-rcnn_8xb8-380k_coco-1024x1024.py'
model = dict(backbone=dict(arch='small'), neck=dict(in_channels=384))
