_base_ = 'mmpretrain::_base_/default_runtime.py'
custom_imports = dict(imports=['mmvim'])
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3, save_best='auto'))
