# The paper's long-sequence fine-tuning: 30 epochs at a constant 1e-5, hardly any weight decay, no EMA.
_base_ = './adamw_300e.py'
optim_wrapper = dict(optimizer=dict(lr=1e-5, weight_decay=1e-8))
param_scheduler = []
train_cfg = dict(max_epochs=30)
custom_hooks = [dict(type='StopAtNonFiniteHook')]
