# Vim-B on ImageNet-1K, the paper's recipe.
_base_ = './vim-tiny_8xb128_in1k.py'
model = dict(backbone=dict(arch='base'), head=dict(in_channels=768))
