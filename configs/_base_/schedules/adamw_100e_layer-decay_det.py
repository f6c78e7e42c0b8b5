# The recipe of the official detection script: 100 epochs of COCO in batches of 64, learning rate
# falling by 0.837 from block to block, ten times smaller after 89 % and again after 96 %.
_base_ = './adamw_380k_det.py'
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.837))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(
        type='MultiStepLR', by_epoch=False, begin=0, end=184375, milestones=[163889, 177546],
        gamma=0.1),
]
train_cfg = dict(max_iters=184375, val_interval=20000)
