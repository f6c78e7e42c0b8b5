# The paper's COCO recipe: AdamW 1e-4, weight decay 0.1, batch 64, linear decay over 380k iterations.
# It names no warm-up; these 250 iterations are ViTDet's.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1),
    constructor='VimOptimWrapperConstructor')
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=250, end=380000),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=380000, val_interval=20000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
auto_scale_lr = dict(enable=False, base_batch_size=64)
