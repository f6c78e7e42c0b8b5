"""Selective state space scan for PyTorch: one function, several backends, needs torch only.

>>> from mmvim_ops import selective_scan
>>> y = selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus=True)
"""

from .backends import available_backends
from .blocks import scan_block_
from .interface import Direction, bidirectional_selective_scan, causal_conv1d, selective_scan

__all__ = [
    'Direction',
    'available_backends',
    'bidirectional_selective_scan',
    'causal_conv1d',
    'scan_block_',
    'selective_scan',
]
