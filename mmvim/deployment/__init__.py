"""Models as files for other programs: ONNX, torch.export and AOTInductor."""

from .files import FORMATS, export, load
from .parts import PARTS, Part, part_of

__all__ = ['FORMATS', 'PARTS', 'Part', 'export', 'load', 'part_of']
