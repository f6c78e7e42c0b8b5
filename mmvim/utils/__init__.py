from .checkpoint import (
    CheckpointError,
    allow_mmengine_checkpoints,
    guard_checkpoints,
    load_from_local,
)

__all__ = ['CheckpointError', 'allow_mmengine_checkpoints', 'guard_checkpoints', 'load_from_local']
