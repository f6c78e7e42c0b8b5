# Vim-Ti with patches of 8 pixels on imagenette, from random weights, on one GPU. Built, not trained.
_base_ = './vim-nano_1xb64-8e_imagenette-96.py'
model = dict(
    backbone=dict(arch='tiny', img_size=128, drop_path_rate=0.1), head=dict(in_channels=192))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=128, crop_ratio_range=(0.35, 1.0)),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='ColorJitter', brightness=0.3, contrast=0.3, saturation=0.3),
    dict(type='PackInputs')
]
train_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    dataset=dict(pipeline=train_pipeline))
max_epochs = 100
param_scheduler = [
    dict(_base_.param_scheduler[0], end=5),
    dict(_base_.param_scheduler[1], begin=5, end=max_epochs)
]
train_cfg = dict(max_epochs=max_epochs, val_interval=10)
