"""Predictions drawn on their pictures."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ['draw_classes', 'draw_instances', 'draw_label_map']

Area = tuple[int, int, int, int]  # left, top, right, bottom


def draw_label_map(
    picture: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    palette: np.ndarray,
    opacity: float,
) -> Image.Image:
    """The picture under its classes' colours, with a name in the largest region of each.

    mmseg's visualiser draws the like. It sorts the pixels of every class in Python, which takes
    seconds for each megapixel, and it writes names over regions too small for them.

    Args:
        picture (np.ndarray): (H, W, 3) of uint8.
        labels (np.ndarray): (H, W), indices of ``classes``.
        palette (np.ndarray): (number of classes, 3) of uint8.
        opacity (float): 0 shows the picture, 1 the colours.
    """
    image = Image.fromarray(cv2.addWeighted(picture, 1 - opacity, palette[labels], opacity, 0))
    step = max(1, max(labels.shape) // 512)
    small = labels[::step, ::step]
    for label in np.unique(small):
        (x, y), radius = _middle((small == label).astype(np.uint8))
        _write(image, (x * step, y * step), classes[label], palette[label], radius * step)
    return image


def _middle(mask: np.ndarray) -> tuple[tuple[int, int], float]:
    """The point of the largest region that is farthest from its edge, and how far that is."""
    _, regions, stats, _ = cv2.connectedComponentsWithStats(mask)
    largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    inside = np.pad((regions == largest).astype(np.uint8), 1)
    distance = cv2.distanceTransform(inside, cv2.DIST_L2, 3)[1:-1, 1:-1]
    y, x = np.unravel_index(distance.argmax(), distance.shape)
    return (int(x), int(y)), float(distance[y, x])


def draw_classes(picture: np.ndarray, lines: Sequence[str]) -> Image.Image:
    """The picture with lines of text in its upper left corner."""
    image = Image.fromarray(picture)
    size = _font_size(image)
    for row, line in enumerate(lines):
        _write(image, (0, round(1.5 * size * row)), line, (0, 0, 0), anchor='la')
    return image


def draw_instances(picture: np.ndarray, sample, dataset_meta: dict, opacity: float) -> Image.Image:
    """The picture with the boxes and masks of a detector's data sample, in their classes' colours.

    mmdet's visualiser writes names over one another and beyond the picture's edge, and its outlines
    of masks are as wide on a small picture as on a large one.

    Args:
        picture (np.ndarray): (H, W, 3) of uint8.
        sample (DetDataSample): With ``pred_instances``: n boxes, labels, scores and, perhaps,
            masks (n, H, W).
        dataset_meta (dict): ``classes`` and ``palette``.
        opacity (float): Of the masks, 0 to 1.
    """
    classes, palette = dataset_meta['classes'], dataset_meta['palette']
    # The surest is drawn last, on top of the others.
    instances = sample.pred_instances[sample.pred_instances.scores.argsort()].numpy()
    width = max(1, round(min(picture.shape[:2]) / 250))
    canvas = picture.copy()
    for k, label in enumerate(instances.labels):
        colour = np.array(palette[label], np.uint8)
        if 'masks' in instances:
            mask = np.asarray(instances.masks[k]).astype(bool)
            canvas[mask] = np.round((1 - opacity) * canvas[mask] + opacity * colour)
            outlines, _ = cv2.findContours(
                mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE
            )
            cv2.drawContours(canvas, outlines, -1, colour.tolist(), width, cv2.LINE_AA)
        left, top, right, bottom = np.round(instances.bboxes[k]).astype(int).tolist()
        cv2.rectangle(canvas, (left, top), (right, bottom), colour.tolist(), width)
    image = Image.fromarray(canvas)
    taken: list[Area] = []
    for k in reversed(range(len(instances))):  # the surest has its name where it belongs
        label, (left, top) = instances.labels[k], np.round(instances.bboxes[k][:2]).astype(int)
        text = f'{classes[label]} {100 * instances.scores[k]:.0f} %'
        taken.append(_write(image, (left, top), text, palette[label], anchor='lb', taken=taken))
    return image


def _font_size(image: Image.Image) -> int:
    return max(10, round(min(image.size) / 32))


def _write(
    image: Image.Image,
    place: tuple[int, int],
    text: str,
    background: Sequence[int],
    room: float | None = None,
    anchor: str = 'mm',
    taken: Sequence[Area] = (),
) -> Area:
    """Write text on a box of a colour, within the picture; not where the room is too low for it.

    The box goes down past those areas that are ``taken``, as long as the picture has room.
    """
    size = _font_size(image)
    if room is not None and 2 * room < size:
        return 0, 0, 0, 0
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size)
    left, top, right, bottom = map(int, draw.textbbox(place, text, font=font, anchor=anchor))
    margin = max(2, size // 6)
    width, height = right - left + 2 * margin, bottom - top + 2 * margin
    x = min(max(0, left - margin), max(0, image.width - width))
    first = y = min(max(0, top - margin), max(0, image.height - height))
    while y + height < image.height:
        below = [b for l, t, r, b in taken if l < x + width and x < r and t < y + height and y < b]
        if not below:
            break
        y = max(below) + 1
    if y + height > image.height:
        y = first
    bright = np.dot(background, (0.299, 0.587, 0.114)) > 140
    draw.rectangle((x, y, x + width, y + height), fill=tuple(map(int, background)))
    place = (place[0] + x + margin - left, place[1] + y + margin - top)
    draw.text(place, text, font=font, anchor=anchor, fill='black' if bright else 'white')
    return x, y, x + width, y + height
