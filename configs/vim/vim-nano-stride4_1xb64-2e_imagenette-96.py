# Vim-nano fine-tuned with patches that overlap by half, four times as many, as the paper's Vim-Ti†.
# It starts from what `compare_backbones.py imagenette` trained.
_base_ = './vim-nano_1xb64-8e_imagenette-96.py'
load_from = 'work_dirs/compare_imagenette_nano/vim_seed0/epoch_8.pth'
model = dict(backbone=dict(stride=4))
optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=1e-8))
param_scheduler = []
train_cfg = dict(max_epochs=2, val_interval=1)
