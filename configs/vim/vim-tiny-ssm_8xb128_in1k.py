# The paper's ablation of the directions: a backward scan, one convolution.
_base_ = './vim-tiny-mean-pool_8xb128_in1k.py'
model = dict(backbone=dict(directions='ssm'))
