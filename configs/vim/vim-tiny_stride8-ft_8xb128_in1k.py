# Vim-Ti†: Vim-Ti fine-tuned with patches that overlap by half, four times as many.
# Start from a trained one: --cfg-options load_from=FILE
_base_ = [
    '../_base_/models/classifier_vim.py', '../_base_/datasets/imagenet_vim.py',
    '../_base_/schedules/adamw_30e_finetune.py', '../_base_/runtime_cls.py'
]
model = dict(backbone=dict(stride=8, drop_path_rate=0.0))
