# Small detectors from random weights.
_base_ = './adamw_scratch.py'
optim_wrapper = dict(clip_grad=dict(max_norm=5.0))
