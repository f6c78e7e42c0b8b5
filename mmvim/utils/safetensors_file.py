"""Reading and writing ``.safetensors``, which hold tensors and strings and cannot run code.

The format has no place for the metadata of modules. What this project's backbones say there of
their position embedding goes into the file's own metadata, under the name of the module.
"""

from __future__ import annotations

import json
from collections import OrderedDict

from torch import Tensor

from .checkpoint_error import CheckpointError, damaged

__all__ = ['load_safetensors', 'save_safetensors']

KEY = 'mmvim'


def load_safetensors(filename: str, name: str) -> dict[str, OrderedDict]:
    """Read a file as ``{'state_dict': …}``, on the CPU.

    Args:
        filename (str): Path of the file.
        name (str): What to call it in messages.

    Raises:
        CheckpointError: The file is damaged, or the package safetensors is not installed.
    """
    safetensors = _library(name)
    try:
        with safetensors.safe_open(filename, framework='pt', device='cpu') as file:
            state_dict = OrderedDict((key, file.get_tensor(key)) for key in file.keys())  # noqa: SIM118
            said = json.loads((file.metadata() or {}).get(KEY, '{}'))
    except (safetensors.SafetensorError, json.JSONDecodeError, RecursionError) as error:
        raise damaged(name, filename, str(error)) from None
    if not isinstance(said, dict) or not all(isinstance(entry, dict) for entry in said.values()):
        raise damaged(name, filename, f'its metadata {KEY!r} is {said}')
    state_dict._metadata = OrderedDict(said)  # type: ignore[attr-defined]
    return {'state_dict': state_dict}


def save_safetensors(state_dict: OrderedDict[str, Tensor], filename: str) -> None:
    """Write the tensors of a state dict and what backbones say in its metadata.

    Raises:
        CheckpointError: The package safetensors is not installed.
    """
    _library(filename)
    from safetensors.torch import save_file

    said = {
        module: {key: entry[key] for key in ('grid', 'cls_token')}
        for module, entry in getattr(state_dict, '_metadata', {}).items()
        if 'grid' in entry
    }
    metadata = {'format': 'pt', **({KEY: json.dumps(said)} if said else {})}
    # Tensors that share memory, or parts of others, are refused; copies are neither.
    save_file({k: v.clone().contiguous() for k, v in state_dict.items()}, filename, metadata)


def _library(name: str):
    try:
        import safetensors
    except ImportError:
        raise CheckpointError(
            f'checkpoint {name} needs the package safetensors: pip install safetensors'
        ) from None
    return safetensors
