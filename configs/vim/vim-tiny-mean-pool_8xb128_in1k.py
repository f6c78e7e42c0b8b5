# The paper's ablation of the classification design: mean over the patches, no class token.
_base_ = './vim-tiny_8xb128_in1k.py'
model = dict(backbone=dict(cls_token=None, out_type='avg_featmap'))
