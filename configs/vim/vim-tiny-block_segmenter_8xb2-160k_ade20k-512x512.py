# The paper's ablation of the directions: `block`.
_base_ = './vim-tiny_segmenter_8xb2-160k_ade20k-512x512.py'
model = dict(backbone=dict(directions='block'))
