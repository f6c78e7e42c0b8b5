# Vim-Ti + Mask R-CNN on COCO, everything but the heads as for Cascade Mask R-CNN.
_base_ = [
    '../_base_/models/mask-rcnn_vim.py', '../_base_/datasets/coco_lsj-1024.py',
    '../_base_/runtime_det.py', '../_base_/schedules/adamw_380k_det.py'
]
