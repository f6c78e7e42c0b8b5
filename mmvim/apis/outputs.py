"""Files of results: label maps, detections, classes, and pictures with these drawn on them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TextIO

import numpy as np
from mmengine.structures import BaseDataElement
from PIL import Image

from mmvim.utils.launch import UserError

from .drawing import draw_classes, draw_instances, draw_label_map
from .inputs import Source

__all__ = [
    'OPACITY',
    'SCORE_THR',
    'Classes',
    'Detections',
    'LabelMaps',
    'Results',
    'open_table',
    'results_of',
]

OPACITY = 0.5
SCORE_THR = 0.3
TOP = 5


def open_table(path: Path) -> TextIO:
    """A CSV file to write in UTF-8, with names of files as they are: some are no text."""
    return open(path, 'w', newline='', encoding='utf-8', errors='surrogateescape')


class Results:
    """Where the results of a task go; a context that completes them at its end.

    Args:
        out_dir (Path): The folder.
        dataset_meta (dict): ``classes`` and ``palette``, as of a loaded model.
        draw (bool): Whether to write ``pictures/``.
        opacity (float): Of what is drawn, 0 to 1.
        score_thr (float): Detections below are left out everywhere.
    """

    described = ''

    def __init__(
        self,
        out_dir: Path,
        dataset_meta: dict,
        draw: bool = True,
        opacity: float = OPACITY,
        score_thr: float = SCORE_THR,
    ) -> None:
        self.out_dir = out_dir
        self.meta = dataset_meta
        self.classes = dataset_meta['classes']
        self.draws = draw
        self.opacity = opacity
        self.score_thr = score_thr

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *error) -> None:
        pass

    def add(self, source: Source, picture: np.ndarray, sample: BaseDataElement) -> None:
        """Write a picture's results."""
        image = self.write(source, picture, sample)
        if image is not None:
            self.save(source, image)

    def save(self, source: Source, image: Image.Image) -> None:
        """Write what was drawn."""
        # Chroma at full size keeps lines and letters clean.
        image.save(self.place('pictures', source, '.jpg'), quality=92, subsampling=0)

    def write(
        self, source: Source, picture: np.ndarray, sample: BaseDataElement
    ) -> Image.Image | None:
        """Write everything but the picture; return the picture if one is wanted."""
        raise NotImplementedError

    def place(self, folder: str, source: Source, suffix: str) -> Path:
        path = self.out_dir / folder / f'{source.name}{suffix}'
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class LabelMaps(Results):
    """``labels/*.png``, whose values are class indices and whose palette has their colours."""

    described = 'labels/ (label maps; labels.csv names their values)'

    def __enter__(self) -> LabelMaps:
        self.palette = np.array(self.meta['palette'], np.uint8).reshape(-1, 3)
        self.out_dir.mkdir(parents=True, exist_ok=True)
        with open_table(self.out_dir / 'labels.csv') as file:
            writer = csv.writer(file)
            writer.writerow(['label', 'class', 'red', 'green', 'blue'])
            for label, name in enumerate(self.classes):
                writer.writerow([label, name, *self.palette[label]])
        return self

    def write(self, source, picture, sample) -> Image.Image | None:
        if 'pred_sem_seg' not in sample:
            raise UserError('the segmentor predicts no label map (pred_sem_seg)')
        labels = sample.pred_sem_seg.data[0].numpy().astype(np.uint16)
        path = self.place('labels', source, '.png')
        if len(self.palette) > 256:  # more than a palette holds
            Image.fromarray(labels).save(path)
        else:
            image = Image.fromarray(labels.astype(np.uint8))
            image.putpalette(self.palette.tobytes())
            image.save(path)
        if not self.draws:
            return None
        return draw_label_map(picture, labels, self.classes, self.palette, self.opacity)

    def add_raster(self, source: Source, picture: np.ndarray, labels: np.ndarray) -> None:
        """Draw the overview of a raster whose label map is written already.

        Args:
            source (Source): The raster.
            picture (np.ndarray): (h, w, 3) of uint8.
            labels (np.ndarray): (h, w), the number of classes where there is no data.
        """
        if self.draws:
            palette, classes = [*self.palette, (0, 0, 0)], [*self.classes, 'no data']
            palette = np.array(palette, np.uint8)
            self.save(source, draw_label_map(picture, labels, classes, palette, self.opacity))


class Detections(Results):
    """``detections.json``: a data set in COCO's format whose annotations have scores.

    Category ids are class indices plus one. ``annotations`` alone is what COCO's ``loadRes`` takes.
    """

    described = 'detections.json (boxes and masks in the format of COCO)'

    def __enter__(self) -> Detections:
        self.images, self.annotations = [], []
        return self

    def __exit__(self, *error) -> None:
        categories = [dict(id=k + 1, name=name) for k, name in enumerate(self.classes)]
        content = dict(images=self.images, annotations=self.annotations, categories=categories)
        self.out_dir.mkdir(parents=True, exist_ok=True)
        (self.out_dir / 'detections.json').write_text(json.dumps(content), encoding='utf-8')

    def write(self, source, picture, sample) -> Image.Image | None:
        if 'pred_instances' not in sample:
            raise UserError('the detector predicts no instances (pred_instances)')
        instances = sample.pred_instances
        sample.pred_instances = instances = instances[instances.scores >= self.score_thr]
        height, width = picture.shape[:2]
        image = dict(id=len(self.images) + 1, file_name=str(source.path))
        self.images.append(dict(image, width=width, height=height))
        for k in range(len(instances)):
            left, top, right, bottom = instances.bboxes[k].tolist()
            annotation = dict(
                id=len(self.annotations) + 1,
                image_id=image['id'],
                category_id=int(instances.labels[k]) + 1,
                bbox=[left, top, right - left, bottom - top],
                area=(right - left) * (bottom - top),
                iscrowd=0,
                score=float(instances.scores[k]),
            )
            if 'masks' in instances:
                annotation.update(_run_lengths(instances.masks[k]))
            self.annotations.append(annotation)
        return draw_instances(picture, sample, self.meta, self.opacity) if self.draws else None


def _run_lengths(mask) -> dict:
    from mmdet.structures.mask import encode_mask_results

    mask = np.asarray(mask)
    (encoded,) = encode_mask_results([mask])
    encoded['counts'] = encoded['counts'].decode()
    return dict(segmentation=encoded, area=int(mask.sum()))


class Classes(Results):
    """``classes.csv``: for each picture the most likely classes, best first, with their scores."""

    described = f'classes.csv (the {TOP} most likely classes of each picture)'

    def __enter__(self) -> Classes:
        self.out_dir.mkdir(parents=True, exist_ok=True)
        self.file = open_table(self.out_dir / 'classes.csv')
        self.writer = csv.writer(self.file)
        count = min(TOP, len(self.classes))
        ranks = ['', *(f'_{rank}' for rank in range(2, count + 1))]
        columns = [f'{column}{rank}' for rank in ranks for column in ('label', 'class', 'score')]
        self.writer.writerow(['file', *columns])
        return self

    def __exit__(self, *error) -> None:
        self.file.close()

    def write(self, source, picture, sample) -> Image.Image | None:
        scores, labels = sample.pred_score.topk(min(TOP, len(self.classes)))
        best = list(zip(labels.tolist(), scores.tolist(), strict=True))
        row = [v for k, score in best for v in (k, self.classes[k], f'{score:.4f}')]
        self.writer.writerow([str(source.path), *row])
        self.file.flush()  # a run that is stopped leaves what it has
        if not self.draws:
            return None
        lines = [f'{self.classes[k]} {100 * score:.1f} %' for k, score in best[:3]]
        return draw_classes(picture, lines)


def results_of(scope: str) -> type[Results]:
    """The results of a config's ``default_scope``."""
    return {'mmseg': LabelMaps, 'mmdet': Detections, 'mmpretrain': Classes}[scope]
