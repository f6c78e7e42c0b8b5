# Vim-Ti on ImageNet-1K, the paper's recipe.
_base_ = [
    '../_base_/models/classifier_vim.py', '../_base_/datasets/imagenet_vim.py',
    '../_base_/schedules/adamw_300e.py', '../_base_/runtime_cls.py'
]
