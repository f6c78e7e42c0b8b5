# DeiT-Ti + Cascade Mask R-CNN on COCO with global attention in every block, as Vim's scans are. What
# the paper compares memory with: --cfg-options model.backbone.attention=explicit
_base_ = './deit-tiny_cascade-mask-rcnn_8xb8-380k_coco-1024x1024.py'
model = dict(backbone=dict(window_size=None, global_indices=None))
