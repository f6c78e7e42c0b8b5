"""The implementations of the operations, one folder each, and how one of them is chosen.

Nothing here may ``import torch``: in this namespace, the name is that of the folder ``torch``.
"""

from .registry import BACKENDS, Backend, available_backends, choose_backend

__all__ = ['BACKENDS', 'Backend', 'available_backends', 'choose_backend']
