"""The generated shapes as an mmseg data set."""

from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

from .shapes import CLASSES, PALETTE


@DATASETS.register_module()
class ShapesDataset(BaseSegDataset):
    """What ``tools/dataset_tools/make_shapes.py`` writes in ADE20K's layout.

    Value 0 of an annotation is unlabelled and ignored, value ``k`` is class ``k - 1``.
    """

    METAINFO = dict(classes=CLASSES, palette=PALETTE)

    def __init__(
        self, img_suffix='.jpg', seg_map_suffix='.png', reduce_zero_label=True, **kwargs
    ) -> None:
        super().__init__(
            img_suffix=img_suffix,
            seg_map_suffix=seg_map_suffix,
            reduce_zero_label=reduce_zero_label,
            **kwargs,
        )
