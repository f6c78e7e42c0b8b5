# Vim-S†: Vim-S fine-tuned with patches that overlap by half, four times as many.
_base_ = './vim-tiny_stride8-ft_8xb128_in1k.py'
model = dict(backbone=dict(arch='small'), head=dict(in_channels=384))
