# DeiT-S + Cascade Mask R-CNN on COCO with global attention in every block.
_base_ = './deit-small_cascade-mask-rcnn_8xb8-380k_coco-1024x1024.py'
model = dict(backbone=dict(window_size=None, global_indices=None))
