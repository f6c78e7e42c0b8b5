# The paper's ablation of the classification design: class tokens at both ends, averaged.
_base_ = './vim-tiny_8xb128_in1k.py'
model = dict(backbone=dict(cls_token='double'))
