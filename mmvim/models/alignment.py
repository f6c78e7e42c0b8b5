"""Maps that are stretched onto the picture: how modules learn that a segmentor will do so.

mmseg resizes logits to the picture's size (``align_corners=False``), whatever stride they have, in
every head, for losses and for predictions. A map lines up with the picture then only if its cells
divide the picture evenly. Detectors read positions off a map by its stride, which is another thing
where a side is no multiple of it. Modules with a method ``align_to_picture`` are told by a call
when they, or a module that holds them, become part of a segmentor.
"""

from __future__ import annotations

from functools import cache

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

__all__ = ['watch_segmentors']


def is_segmentor(module: nn.Module) -> bool:
    """Whether it is one of mmseg's, without importing that."""
    return any(
        base.__name__ == 'BaseSegmentor' and base.__module__.startswith('mmseg.')
        for base in type(module).__mro__
    )


def tell_parts(parent: nn.Module, name: str, part: nn.Module | None) -> None:
    if part is not None and is_segmentor(parent):
        for module in part.modules():
            if hasattr(module, 'align_to_picture'):
                module.align_to_picture()


@cache
def watch_segmentors() -> None:
    """Begin to tell parts of segmentors. Torch calls ``tell_parts`` where modules get children."""
    register_module_module_registration_hook(tell_parts)
