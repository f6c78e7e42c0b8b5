from .layer_decay import VimOptimWrapperConstructor

__all__ = ['VimOptimWrapperConstructor']
