# Vim-Ti + UperNet on ADE20K, the recipe of the official script: mixer outputs as features, layer
# decay, sliding-window test.
_base_ = [
    '../_base_/models/upernet_vim.py', 'mmseg::_base_/datasets/ade20k.py',
    '../_base_/runtime_seg.py', '../_base_/schedules/adamw_60k_layer-decay.py'
]
model = dict(
    backbone=dict(feature_source='mixer'),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)))
train_dataloader = dict(batch_size=8)
