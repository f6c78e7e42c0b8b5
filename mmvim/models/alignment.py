"""Maps that are stretched onto the picture: how modules learn that a segmentor will do so.

mmseg resizes logits to the picture's size (``align_corners=False``), whatever stride they have, in
every head, for losses and for predictions. A map lines up with the picture then only if its cells
divide the picture evenly. Detectors read positions off a map by its stride, which differs where a
side is no multiple of it. ``align_to_picture`` of a module is called when the module, or one that
holds it, becomes part of a segmentor.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

__all__ = ['is_segmentor', 'tell_parts']


def is_segmentor(module: nn.Module) -> bool:
    """Whether it is one of mmseg's, without importing that."""
    return any(
        base.__name__ == 'BaseSegmentor' and base.__module__.startswith('mmseg.')
        for base in type(module).__mro__
    )


def tell_parts(parent: nn.Module, name: str, part: nn.Module | None) -> None:
    """Torch calls it, from the import of this file on, wherever a module gets a child."""
    if part is not None and is_segmentor(parent):
        for module in part.modules():
            if hasattr(module, 'align_to_picture'):
                module.align_to_picture()


register_module_module_registration_hook(tell_parts)
