"""The implementations of the operations, one folder each, and how one of them is chosen.

``backend.py`` says what a backend is. Every folder has the same inside: ``__init__.py`` the backend
and its limits, ``library.py`` what has to be there for it to run, ``scan.py`` and ``conv1d.py`` the
operations; kernels are in files of their own or in ``csrc``. Schemas, shapes and gradients of the
operators are in ``schemas.py`` and ``operators.py``, once for all. To add a backend, add a folder
and an entry in ``registry.py``.

Nothing in this file may ``import torch``: here the name is that of the folder ``torch``.
"""

from .backend import Backend
from .registry import BACKENDS, available_backends, choose_backend, selected, use_backend

__all__ = [
    'BACKENDS',
    'Backend',
    'available_backends',
    'choose_backend',
    'selected',
    'use_backend',
]
