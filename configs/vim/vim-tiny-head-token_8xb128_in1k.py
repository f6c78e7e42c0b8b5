# The paper's ablation of the classification design: a class token before all patches.
_base_ = './vim-tiny_8xb128_in1k.py'
model = dict(backbone=dict(cls_token='head'))
