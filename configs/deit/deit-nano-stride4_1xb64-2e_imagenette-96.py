# DeiT-nano with four times as many patches, everything but the backbone as for Vim.
_base_ = './deit-nano_1xb64-8e_imagenette-96.py'
load_from = 'work_dirs/compare_imagenette_nano/deit_seed0/epoch_8.pth'
model = dict(backbone=dict(stride=4))
optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=1e-8))
param_scheduler = []
train_cfg = dict(max_epochs=2, val_interval=1)
