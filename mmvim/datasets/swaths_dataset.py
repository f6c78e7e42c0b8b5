"""The generated swaths as an mmseg data set."""

from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

from .swaths import CLASSES, PALETTE


@DATASETS.register_module()
class SwathsDataset(BaseSegDataset):
    """What ``tools/dataset_tools/make_swaths.py`` writes; values of annotations are classes."""

    METAINFO = dict(classes=CLASSES, palette=PALETTE)

    def __init__(self, img_suffix='.png', seg_map_suffix='.png', **kwargs) -> None:
        super().__init__(img_suffix=img_suffix, seg_map_suffix=seg_map_suffix, **kwargs)
