# Vim-Ti + UperNet on ADE20K, the backward scan of each block reading the patches column by column.
_base_ = './vim-tiny_upernet_8xb2-160k_ade20k-512x512.py'
model = dict(backbone=dict(directions='cross'))
