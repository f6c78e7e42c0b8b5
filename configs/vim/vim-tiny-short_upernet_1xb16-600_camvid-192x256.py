# Vim-Ti with patches of 8 pixels + UperNet on CamVid, from random weights, in about two minutes of one
# GPU: the crops of vim-nano, and about as many of them.
_base_ = './vim-nano_upernet_1xb4-2k_camvid-192x256.py'
embed_dims = 192
model = dict(
    backbone=dict(arch='tiny', drop_path_rate=0.1, out_indices=(7, 15, 23)),
    neck=dict(in_channels=embed_dims),
    decode_head=dict(in_channels=[embed_dims] * 3, channels=embed_dims),
    auxiliary_head=dict(in_channels=embed_dims, channels=256))
train_dataloader = dict(batch_size=16, num_workers=8, persistent_workers=True)
max_iters = 600
optim_wrapper = dict(optimizer=dict(lr=5e-4))
param_scheduler = [
    dict(_base_.param_scheduler[0], end=50),
    dict(_base_.param_scheduler[1], begin=50, end=max_iters)
]
train_cfg = dict(max_iters=max_iters, val_interval=300)
default_hooks = dict(checkpoint=dict(interval=500))
