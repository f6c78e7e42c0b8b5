# Vim-Ti + UperNet on ADE20K, the paper's recipe.
_base_ = [
    '../_base_/models/upernet_vim.py', 'mmseg::_base_/datasets/ade20k.py',
    '../_base_/runtime_seg.py', '../_base_/schedules/adamw_160k.py'
]
train_dataloader = dict(batch_size=2)
