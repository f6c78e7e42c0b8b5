# The paper's ablation of the directions: forward only.
_base_ = './vim-tiny-mean-pool_8xb128_in1k.py'
model = dict(backbone=dict(directions='none'))
