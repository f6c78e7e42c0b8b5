from .checkpoint import guard_checkpoints, load_checkpoint, load_from_http, load_from_local
from .errors import CheckpointError
from .inert import allow_mmengine_checkpoints

__all__ = [
    'CheckpointError',
    'allow_mmengine_checkpoints',
    'guard_checkpoints',
    'load_checkpoint',
    'load_from_http',
    'load_from_local',
]
