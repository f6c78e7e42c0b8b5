# Vim-Ti + Cascade Mask R-CNN on COCO, the recipe of the official script: rotary embedding of hidden
# states and residual stream, stochastic depth, layer decay.
_base_ = [
    '../_base_/models/cascade-mask-rcnn_vim.py', '../_base_/datasets/coco_lsj-1024.py',
    '../_base_/runtime_det.py', '../_base_/schedules/adamw_100e_layer-decay_det.py'
]
model = dict(backbone=dict(rope=True, rope_residual=True, rope_grid=14, drop_path_rate=0.1))
