"""Selective state space scan for PyTorch: one function, several backends, needs torch only.

>>> from mmvim_ops import selective_scan
>>> y = selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus=True)
"""

from .backends import available_backends
from .interface import Direction, bidirectional_selective_scan, causal_conv1d, selective_scan
from .linear import linear
from .mamba_mixer import MixerDirection, mamba_mixer
from .segments import scan_block_

__all__ = [
    'Direction',
    'MixerDirection',
    'available_backends',
    'bidirectional_selective_scan',
    'causal_conv1d',
    'linear',
    'mamba_mixer',
    'scan_block_',
    'selective_scan',
]
