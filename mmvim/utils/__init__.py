from .checkpoint import (
    guard_checkpoints,
    load_checkpoint,
    load_from_http,
    load_from_hub,
    load_from_local,
)
from .checkpoint_error import CheckpointError
from .inert import allow_mmengine_checkpoints
from .safetensors_file import save_safetensors

__all__ = [
    'CheckpointError',
    'allow_mmengine_checkpoints',
    'guard_checkpoints',
    'load_checkpoint',
    'load_from_http',
    'load_from_hub',
    'load_from_local',
    'save_safetensors',
]
