# Vim-Ti + Cascade Mask R-CNN on COCO, the paper's recipe.
_base_ = [
    '../_base_/models/cascade-mask-rcnn_vim.py', '../_base_/datasets/coco_lsj-1024.py',
    '../_base_/runtime_det.py', '../_base_/schedules/adamw_380k_det.py'
]
