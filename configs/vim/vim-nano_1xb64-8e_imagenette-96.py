# A Vision Mamba of a million parameters (patch 8) on imagenette, from random weights.
_base_ = [
    '../_base_/models/classifier_vim.py', '../_base_/datasets/imagenette_96.py',
    '../_base_/runtime_cls.py'
]
model = dict(
    backbone=dict(arch='nano', img_size=96, patch_size=8, drop_path_rate=0.0),
    head=dict(num_classes=10, in_channels=96, topk=(1, )),
    train_cfg=None)  # no mixup: short trainings do not overfit

max_epochs = 8
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05),
    clip_grad=dict(max_norm=1.0),
    constructor='VimOptimWrapperConstructor')
param_scheduler = [
    dict(
        type='LinearLR', start_factor=0.01, by_epoch=True, begin=0, end=1,
        convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR',
        eta_min=1e-5,
        by_epoch=True,
        begin=1,
        end=max_epochs,
        convert_to_iter_based=True)
]
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=4)
val_cfg = dict()
test_cfg = dict()
custom_hooks = [dict(type='StopAtNonFiniteHook')]
default_hooks = dict(
    logger=dict(interval=20), checkpoint=dict(interval=1, max_keep_ckpts=1, save_best=None))
randomness = dict(seed=0)
