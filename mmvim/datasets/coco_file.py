"""An annotation file in COCO's format: what is missing is mended where that is safe, or refused."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable

from mmdet.datasets.api_wrappers import COCO
from mmengine.logging import print_log
from pycocotools import mask as masks

from mmvim.utils.errors import UserError

__all__ = ['CheckedCoco']

REQUIRED = {
    'images': ('id', 'file_name', 'height', 'width'),
    'categories': ('id', 'name'),
    'annotations': ('image_id', 'category_id', 'bbox'),
}


class CheckedCoco(COCO):
    """The index of an annotation file, with what its readers take for granted in place.

    Annotations without ``iscrowd`` are no crowds. One without ``area`` gets that of its mask, or
    else of its box. Ids only tell annotations apart, so all are numbered anew where one is 0 (which
    ``COCOeval`` takes for "no match"), missing, used twice or no integer. A warning counts what was
    mended.

    Args:
        annotation_file (str): A JSON file.

    Raises:
        UserError: The file is no such file, has no images, or entries lack what cannot be made up:
            the message names the file, counts them and shows the first. Also where it has not the
            classes that are asked for.
    """

    def __init__(self, annotation_file: str) -> None:
        self.source = annotation_file
        try:
            super().__init__(annotation_file)
        except (ValueError, AssertionError) as error:  # no JSON; a list
            raise UserError(f'{annotation_file} is no annotation file of COCO: {error}') from None

    def createIndex(self) -> None:
        refuse_incomplete(self.dataset, self.source)
        mended = mend_annotations(self.dataset)
        if mended:
            text = f'{self.source}: {"; ".join(mended)}'
            print_log(text, logger='current', level=logging.WARNING)
        super().createIndex()

    def get_cat_ids(self, cat_names=(), sup_names=(), cat_ids=()) -> list[int]:
        """Ids of the named categories, which must be there, and in this order.

        mmdet numbers labels by the order of the file, whatever that of the classes is; pictures and
        tables would show wrong names.
        """
        found = super().get_cat_ids(cat_names, sup_names, cat_ids)
        wanted, names = tuple(cat_names), tuple(self.cats[i]['name'] for i in found)
        if wanted and len(names) != len(wanted):
            raise UserError(
                f'{self.source} has {len(names)} of the {len(wanted)} classes '
                f'({", ".join(wanted[:3])}, …): name those it has in dataset.metainfo.classes'
            )
        if wanted and names != wanted:
            raise UserError(
                f'{self.source} has the {len(names)} classes in another order than '
                f'dataset.metainfo.classes: write classes={names}'
            )
        return found


def refuse_incomplete(content: dict, source: str) -> None:
    """Raise a UserError for what is missing and cannot be made up."""

    def refuse(entries: list, what: str) -> None:
        if entries:
            first = str(entries[0])[:200]
            raise UserError(f'{source}: {len(entries)} {what}, the first is {first}')

    if not content.get('images'):
        raise UserError(f'{source} lists no images')
    for part, keys in REQUIRED.items():
        entries = content.get(part) or []
        for key in keys:
            lacking = [entry for entry in entries if entry.get(key) is None]
            refuse(lacking, f'of {len(entries)} {part} lack {key}')
    for part in ('images', 'categories'):
        repeated = repeats(entry['id'] for entry in content.get(part) or [])
        refuse(repeated, f'ids of {part} are used more than once')
    annotations = content.get('annotations') or []
    no_boxes = [annotation for annotation in annotations if not is_box(annotation['bbox'])]
    refuse(no_boxes, 'annotations have a bbox that is none')
    known = {category['id'] for category in content.get('categories') or []}
    unknown = [a for a in annotations if a['category_id'] not in known]
    refuse(unknown, f'annotations have a category_id that is none of the {len(known)} categories')


def is_box(box) -> bool:
    return len(box) == 4 and all(isinstance(v, int | float) and math.isfinite(v) for v in box)


def repeats(ids: Iterable) -> list:
    return [value for value, count in Counter(ids).items() if count > 1]


def mend_annotations(content: dict) -> list[str]:
    """Fill in ids, areas and crowd flags, in place; returns in words what was done."""
    annotations = content.get('annotations') or []
    images = {image['id']: image for image in content['images']}

    def fill(key: str, value: Callable[[dict], float]) -> int:
        lacking = [annotation for annotation in annotations if annotation.get(key) is None]
        for annotation in lacking:
            annotation[key] = value(annotation)
        return len(lacking)

    mended = []
    ids = Counter(annotation.get('id') for annotation in annotations)
    bad = sum(n for i, n in ids.items() if n > 1 or i == 0 or not isinstance(i, int))
    if bad:
        mended.append(
            f'{bad} annotation ids are 0, missing, repeated or no integers: all are numbered anew'
        )
        for number, annotation in enumerate(annotations, 1):
            annotation['id'] = number
    if count := fill('area', lambda annotation: area(annotation, images)):
        mended.append(f'{count} annotations have no area: that of their mask or box is taken')
    if count := fill('iscrowd', lambda annotation: 0):
        mended.append(f'{count} annotations have no iscrowd: they are taken for single objects')
    return mended


def area(annotation: dict, images: dict) -> float:
    """Pixels of the mask, as COCO counts them; of the box where there is no mask."""
    mask, image = annotation.get('segmentation'), images.get(annotation['image_id'])
    if isinstance(mask, list):
        mask = [polygon for polygon in mask if len(polygon) >= 6]
    if not mask or image is None or (isinstance(mask, dict) and 'counts' not in mask):
        return annotation['bbox'][2] * annotation['bbox'][3]
    if isinstance(mask, list) or isinstance(mask['counts'], list):
        mask = masks.frPyObjects(mask, image['height'], image['width'])
    if isinstance(mask, list):
        mask = masks.merge(mask)
    return float(masks.area(mask))
