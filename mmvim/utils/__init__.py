from .checkpoint import (
    CheckpointError,
    allow_mmengine_checkpoints,
    guard_checkpoints,
    load_checkpoint,
)

__all__ = ['CheckpointError', 'allow_mmengine_checkpoints', 'guard_checkpoints', 'load_checkpoint']
