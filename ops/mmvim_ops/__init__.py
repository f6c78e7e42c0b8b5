"""Selective state space scan for PyTorch: one function, several backends, needs torch only.

>>> from mmvim_ops import selective_scan
>>> y = selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus=True)
"""

from .backends import available_backends, use_backend
from .interface import (
    Direction,
    bidirectional_selective_scan,
    causal_conv1d,
    scan_block_,
    scan_segment_,
    selective_scan,
)
from .linear import linear
from .mamba_mixer import MixerDirection, mamba_mixer
from .onnxruntime import onnxruntime_library

__all__ = [
    'Direction',
    'MixerDirection',
    'available_backends',
    'bidirectional_selective_scan',
    'causal_conv1d',
    'linear',
    'mamba_mixer',
    'onnxruntime_library',
    'scan_block_',
    'scan_segment_',
    'selective_scan',
    'use_backend',
]
