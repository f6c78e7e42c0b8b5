"""Data sets that come with the package."""

from importlib.util import find_spec

# Generating the data needs no framework. One that is there but broken must still be heard.
if find_spec('mmdet') is not None:
    from .coco import CheckedCocoDataset, CheckedCocoMetric  # noqa: F401
if find_spec('mmseg') is not None:
    from .shapes_dataset import ShapesDataset  # noqa: F401
    from .swaths_dataset import SwathsDataset  # noqa: F401
