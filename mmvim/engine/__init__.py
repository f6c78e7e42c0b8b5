from .check_data import CheckDataHook
from .checkpoint_hook import FitCheckpointHook
from .cpu_amp import CpuAmpOptimWrapper
from .finite import StopAtNonFiniteHook
from .layer_decay import VimOptimWrapperConstructor

__all__ = [
    'CheckDataHook',
    'CpuAmpOptimWrapper',
    'FitCheckpointHook',
    'StopAtNonFiniteHook',
    'VimOptimWrapperConstructor',
]
