from .atomic_checkpoint import AtomicCheckpointHook
from .check_data import CheckDataHook
from .checkpoint_hook import FillModelHook, FitCheckpointHook
from .cpu_amp import CpuAmpOptimWrapper
from .cpu_runner import CpuDistributedRunner
from .finite import StopAtNonFiniteHook
from .layer_decay import VimOptimWrapperConstructor
from .reproducible import NumberedSampler, SeededDataset, SeedIterationHook
from .resumable_runner import ResumableRunner, build_runner

__all__ = [
    'AtomicCheckpointHook',
    'CheckDataHook',
    'CpuAmpOptimWrapper',
    'CpuDistributedRunner',
    'FillModelHook',
    'FitCheckpointHook',
    'NumberedSampler',
    'ResumableRunner',
    'SeedIterationHook',
    'SeededDataset',
    'StopAtNonFiniteHook',
    'VimOptimWrapperConstructor',
    'build_runner',
]
