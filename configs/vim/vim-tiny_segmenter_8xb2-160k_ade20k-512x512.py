# Vim-Ti + Segmenter on ADE20K: what the paper's ablation of the directions is measured with. It gives
# no recipe for it; this is that of UperNet.
_base_ = [
    '../_base_/models/segmenter_vim.py', 'mmseg::_base_/datasets/ade20k.py',
    '../_base_/runtime_seg.py', '../_base_/schedules/adamw_160k.py'
]
train_dataloader = dict(batch_size=2)
