from .checkpoint_hook import FitCheckpointHook
from .cpu_amp import CpuAmpOptimWrapper
from .finite import StopAtNonFiniteHook
from .layer_decay import VimOptimWrapperConstructor

__all__ = [
    'CpuAmpOptimWrapper',
    'FitCheckpointHook',
    'StopAtNonFiniteHook',
    'VimOptimWrapperConstructor',
]
