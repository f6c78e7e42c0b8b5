# Vim-S on ImageNet-1K, the paper's recipe.
_base_ = './vim-tiny_8xb128_in1k.py'
model = dict(backbone=dict(arch='small'), head=dict(in_channels=384))
