# The paper's ablation of the classification design: the head on every patch, maximum over them.
_base_ = './vim-tiny_8xb128_in1k.py'
custom_imports = dict(imports=['mmvim', 'mmvim.models.max_pool_head'])
model = dict(backbone=dict(cls_token=None, out_type='raw'), head=dict(type='MaxPoolClsHead'))
