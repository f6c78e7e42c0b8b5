_base_ = 'mmseg::_base_/default_runtime.py'
custom_imports = dict(imports=['mmvim'])
sync_bn = 'torch'  # batch norm is synchronised when, and only when, training is distributed
custom_hooks = [dict(type='StopAtNonFiniteHook')]
