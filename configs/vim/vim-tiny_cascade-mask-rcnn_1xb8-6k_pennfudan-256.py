# Vim-Ti with patches of 8 pixels on Penn-Fudan, from random weights, on one GPU. Built and stepped,
# not trained to the end.
_base_ = './vim-nano_cascade-mask-rcnn_1xb2-2k_pennfudan-256.py'
model = dict(
    backbone=dict(arch='tiny', drop_path_rate=0.1), neck=dict(in_channels=192))
train_dataloader = dict(batch_size=8, num_workers=8, persistent_workers=True)
max_iters = 6000
optim_wrapper = dict(optimizer=dict(lr=5e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=250),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=250, end=max_iters),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
default_hooks = dict(checkpoint=dict(interval=250))
