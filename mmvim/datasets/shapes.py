"""A generated data set: textured shapes that lie on textured ground and cover each other.

A class is an outline and a family of hues that touches its neighbours'; texture, size and rotation
are drawn without regard to it, and the ground is pale but of any hue. The hues are what lets a
small network learn the classes in minutes: colour alone tells most of them, outlines the rest.
With ``palette='paired'`` two outlines share every family of hues, so that only the outline tells
them apart, and telling it takes a look at the whole shape.
Needs numpy and OpenCV only.
"""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

CLASSES = ('ground', 'disc', 'square', 'triangle', 'star', 'ring', 'cross')
PALETTE = [  # RGB
    [96, 100, 112],
    [230, 57, 70],
    [38, 110, 240],
    [46, 168, 84],
    [255, 200, 40],
    [165, 80, 225],
    [40, 205, 215],
]
SPLITS = ('train', 'val')
VERSION = 1  # raise it whenever the same arguments give different files

_SHAPES_PER_SCENE = (2, 5)
_SHAPE_SIDE = (0.22, 0.42)  # square root of a shape's area, as a part of the image side
_MIN_VISIBLE = 0.6  # part of a shape that must stay uncovered
_SUPERSAMPLE = 4
# Families of hues for each class but the ground, and how many there are.
PALETTES = {
    'class': ((1, 2, 3, 4, 5, 6), 6),
    'paired': ((0, 1, 2, 2, 0, 1), 3),
}


@dataclass(frozen=True)
class Instance:
    """One shape: its index in ``CLASSES`` and the (H, W) bool mask of its visible pixels."""

    label: int
    mask: np.ndarray


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it.

    Attributes:
        image: (H, W, 3) uint8 in BGR order, as OpenCV writes it.
        semantic: (H, W) uint8; 0 is unlabelled, ``k`` is class ``CLASSES[k - 1]``.
        instances: from the lowest to the topmost; none is empty, and no two share a pixel.
    """

    image: np.ndarray
    semantic: np.ndarray
    instances: list[Instance]


def draw_scene(rng: np.random.Generator, size: int = 128, palette: str = 'class') -> Scene:
    """Draw a square picture of 2 to 5 shapes, each visible for the most part.

    Pixels that an outline cuts through are unlabelled: they are a blend of two things.

    Args:
        rng: the only source of randomness.
        size: image side in pixels.
        palette: ``'class'``: every class has hues of its own; ``'paired'``: disc and ring, square
            and cross, triangle and star have the same.
    """
    families, num_families = PALETTES[palette]
    hue_step = 360 / num_families  # degrees
    angle = rng.uniform(0, 2 * np.pi)
    light = np.array([np.cos(angle), np.sin(angle)])
    any_hue = rng.uniform(0, 360)
    canvas = _paint(rng, size, any_hue, saturation=(0.05, 0.35), value=(0.4, 0.8), contrast=0.22)

    labels, areas = [0], [0]
    owner = np.zeros((size, size), np.uint8)  # index in `labels` of what is on top
    blended = np.zeros((size, size), bool)
    for _ in range(rng.integers(_SHAPES_PER_SCENE[0], _SHAPES_PER_SCENE[1] + 1)):
        label = int(rng.integers(1, len(CLASSES)))
        cover = _place(rng, size, CLASSES[label], owner, areas)
        if cover is None:
            continue
        mask = cover >= 0.5
        owner[mask] = len(labels)
        labels.append(label)
        areas.append(int(np.count_nonzero(mask)))
        edge = (cover > 0.25) & (cover < 0.75)
        blended = edge | (blended & (cover <= 0.25))
        hue = families[label - 1] * hue_step + rng.uniform(-0.5, 0.5) * hue_step
        paint = _paint(rng, size, hue, saturation=(0.45, 0.95), value=(0.6, 1.0), contrast=0.45)
        canvas = _lay(canvas, paint, cover, light)

    image = _photograph(rng, canvas, light)
    semantic = (np.array(labels, np.uint8) + 1)[owner]
    semantic[blended] = 0
    instances = [Instance(label, owner == i) for i, label in enumerate(labels) if i > 0]
    return Scene(image, semantic, instances)


def write_ade20k(root: str | Path, **arguments) -> bool:
    """Write the data set in ADE20K's layout; arguments and return value as in `write_coco`.

    ``images/{training,validation}/*.jpg`` and ``annotations/{training,validation}/*.png``;
    annotations hold ``Scene.semantic``.
    """
    return _write(Path(root), 'ade20k', _write_ade20k_split, **arguments)


def write_coco(root: str | Path, **arguments) -> bool:
    """Write the data set in COCO's layout, without the ground: it is no object.

    ``{train,val}/*.jpg`` and ``annotations/instances_{train,val}.json``; masks are run lengths,
    which keep holes and occlusion exact.

    Args:
        root: folder to create. It appears only when the data set is complete.
        train, val (int): images per split. Default: 240 and 40.
        size (int): image side in pixels. Default: 128.
        seed (int): image ``i`` of a split depends on the seed, the split and ``i`` alone.
        palette (str): how colours go with classes, as in `draw_scene`. Default: 'class'.
        overwrite (bool): replace a data set that was generated with other arguments.
        progress: wraps the range of image numbers of a split, as ``tqdm`` does.

    Returns:
        False if ``root`` held this very data set already and nothing was done.

    Raises:
        ValueError: an argument is out of range.
        FileExistsError: ``root`` holds something else.
    """
    return _write(Path(root), 'coco', _write_coco_split, **arguments)


def read_meta(root: str | Path) -> dict | None:
    """What generated the data set in ``root``; None if it is not a generated one.

    ``arguments`` are the generator's, ``pixels[split]`` counts each value of the semantic map.
    """
    try:
        meta = json.loads((Path(root) / 'meta.json').read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return meta if isinstance(meta, dict) and {'arguments', 'pixels'} <= meta.keys() else None


# ------------------------------------------------------------------------------------ drawing


def _polygon(corners: int, inner: float = 1.0) -> np.ndarray:
    """Corners on the unit circle, every second one at the radius ``inner``."""
    angles = np.arange(corners) * 2 * np.pi / corners
    radii = np.where(np.arange(corners) % 2, inner, 1.0)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _unit_area(*contours: np.ndarray) -> list[np.ndarray]:
    """Scale an outline (the later contours are holes) to area 1: classes get equal pixels."""
    areas = [cv2.contourArea(contour.astype(np.float32)) for contour in contours]
    return [contour / np.sqrt(areas[0] - sum(areas[1:])) for contour in contours]


_PLUS = np.array(
    [[3, 1], [1, 1], [1, 3], [-1, 3], [-1, 1], [-3, 1]]
    + [[-3, -1], [-1, -1], [-1, -3], [1, -3], [1, -1], [3, -1]]
)
_OUTLINES = {
    'disc': _unit_area(_polygon(96)),
    'square': _unit_area(_polygon(4)),
    'triangle': _unit_area(_polygon(3)),
    'star': _unit_area(_polygon(10, inner=0.45)),
    'ring': _unit_area(_polygon(96), 0.55 * _polygon(96)),
    'cross': _unit_area(_PLUS),
}


def _place(rng, size, name, owner, areas, tries=25):
    """Find a place that leaves enough of every earlier shape; the (H, W) cover, 0 to 1, or None."""
    for _ in range(tries):
        turn = rng.uniform(0, 2 * np.pi)
        side, centre = rng.uniform(*_SHAPE_SIDE), rng.uniform(0.15, 0.85, 2)
        rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        scale = size * _SUPERSAMPLE
        contours = [
            np.rint((contour @ rotation * side + centre) * scale).astype(np.int32)
            for contour in _OUTLINES[name]
        ]
        cover = np.zeros((scale, scale), np.float32)
        cv2.fillPoly(cover, contours, 1.0)
        cover = cv2.resize(cover, (size, size), interpolation=cv2.INTER_AREA)
        visible = np.bincount(owner[cover < 0.5], minlength=len(areas))
        if (visible[1:] >= _MIN_VISIBLE * np.array(areas[1:])).all():
            return cover
    return None


def _texture(rng, size):
    """A random pattern: (size, size) float32 between 0 and 1."""
    angle, period = rng.uniform(0, np.pi), rng.uniform(0.06, 0.16)
    y, x = np.mgrid[:size, :size] * (2 * np.pi / (size * period))
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    kind = rng.choice(['plain', 'stripes', 'checker', 'dots', 'clouds', 'grain'])
    if kind == 'stripes':
        field = 3 * np.sin(u)
    elif kind == 'checker':
        field = 5 * np.sin(u / 2) * np.sin(v / 2)
    elif kind == 'dots':
        field = 3 * (np.cos(u) + np.cos(v)) - 1
    elif kind == 'plain':
        field = np.full_like(u, -1.0)
    else:
        cells = 9 if kind == 'clouds' else 48
        noise = rng.uniform(-1.3, 1.3, (cells, cells))
        field = cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)
    return (0.5 + 0.5 * np.clip(field, -1, 1)).astype(np.float32)


def _paint(rng, size, hue, saturation, value, contrast):
    """A pattern in two related colours: (size, size, 3) float32 BGR, 0 to 1."""
    first = (hue % 360, rng.uniform(*saturation), rng.uniform(*value))
    second = (hue + rng.uniform(-15, 15)) % 360, first[1] * rng.uniform(0.5, 1), first[2]
    colours = cv2.cvtColor(np.array([[first, second]], np.float32), cv2.COLOR_HSV2BGR)[0]
    colours[1] *= 1 - contrast * rng.uniform(0.6, 1.0)
    mix = _texture(rng, size)[..., None]
    return colours[0] * (1 - mix) + colours[1] * mix


def _lay(canvas, paint, cover, light):
    """Lay a shape on the canvas: its shadow, then its paint with a bright and a dark rim."""
    size = len(cover)
    shift = np.array([[1, 0, light[0] * 0.02 * size], [0, 1, light[1] * 0.02 * size]])
    soft = cv2.GaussianBlur(cover, (0, 0), 0.016 * size)
    shadow = cv2.warpAffine(soft, shift, (size, size))
    rim = cv2.GaussianBlur(cover, (0, 0), 0.008 * size)
    slope = np.gradient(rim)
    bevel = 0.02 * size * (slope[1] * light[0] + slope[0] * light[1])
    cover = cover[..., None]
    return canvas * (1 - 0.5 * shadow[..., None]) * (1 - cover) + cover * paint * (
        1 + 0.35 * np.clip(bevel, -1, 1)[..., None]
    )


def _photograph(rng, canvas, light):
    """Add a gradient of light and sensor noise; round to uint8."""
    size = len(canvas)
    y, x = np.mgrid[:size, :size] / size - 0.5
    gradient = 1 - rng.uniform(0.1, 0.4) * (x * light[0] + y * light[1])
    noise = rng.normal(0, rng.uniform(0.005, 0.025), canvas.shape)
    return np.rint(255 * np.clip(canvas * gradient[..., None] + noise, 0, 1)).astype(np.uint8)


# ------------------------------------------------------------------------------------ writing


def _write(
    root: Path,
    layout: str,
    write_split: Callable[[Path, str, Iterable[Scene]], None],
    train: int = 240,
    val: int = 40,
    size: int = 128,
    seed: int = 0,
    palette: str = 'class',
    overwrite: bool = False,
    progress: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> bool:
    for name, number, least in (
        ('train', train, 1),
        ('val', val, 1),
        ('size', size, 32),
        ('seed', seed, 0),
    ):
        if number < least:
            raise ValueError(f'{name} must be at least {least}, not {number}')
    if palette not in PALETTES:
        raise ValueError(f'palette must be one of {tuple(PALETTES)}, not {palette!r}')
    arguments = dict(version=VERSION, format=layout, size=size, train=train, val=val, seed=seed)
    if palette != 'class':  # data sets from before there was a choice do not name it
        arguments['palette'] = palette
    root = root.resolve()
    replaced = root.is_file() or (root.is_dir() and any(root.iterdir()))
    if replaced:
        present = read_meta(root)
        if present is None:
            raise FileExistsError(f'{root} holds something that was not generated here: move it')
        if present['arguments'] == arguments:
            return False
        if not overwrite:
            raise FileExistsError(
                f'{root} holds shapes of other arguments ({present["arguments"]}, '
                f'asked for {arguments}): choose another folder or overwrite'
            )

    root.parent.mkdir(parents=True, exist_ok=True)
    # A sibling is on the same disk, so the last step is a rename: all or nothing.
    with tempfile.TemporaryDirectory(prefix=f'.{root.name}-', dir=root.parent) as scratch:
        new = Path(scratch, 'new')
        pixels = {}
        for split, count in zip(SPLITS, (train, val), strict=True):
            pixels[split] = np.zeros(len(CLASSES) + 1, int)
            scenes = _scenes(split, progress(range(count)), size, seed, palette, pixels)
            write_split(new, split, scenes)
        counts = {split: numbers.tolist() for split, numbers in pixels.items()}
        meta = dict(arguments=arguments, pixels=counts)
        (new / 'meta.json').write_text(json.dumps(meta, indent=2) + '\n')
        if replaced:
            root.rename(Path(scratch, 'old'))
        new.rename(root)
    return True


def _scenes(split, indices, size, seed, palette, pixels) -> Iterator[Scene]:
    """Draw the scenes of a split and add their pixels up, per value of the semantic map."""
    for index in indices:
        rng = np.random.default_rng([seed, SPLITS.index(split), index])
        scene = draw_scene(rng, size, palette)
        pixels[split] += np.bincount(scene.semantic.ravel(), minlength=len(CLASSES) + 1)
        yield scene


def _save(path: Path, array: np.ndarray) -> None:
    done, data = cv2.imencode(path.suffix, array)
    if not done:
        raise OSError(f'OpenCV cannot encode {path.name}')
    path.write_bytes(data.tobytes())


def _write_ade20k_split(root, split, scenes):
    folder = {'train': 'training', 'val': 'validation'}[split]
    images, annotations = root / 'images' / folder, root / 'annotations' / folder
    images.mkdir(parents=True)
    annotations.mkdir(parents=True)
    for index, scene in enumerate(scenes, start=1):
        name = f'shapes_{split}_{index:08d}'
        _save(images / f'{name}.jpg', scene.image)
        _save(annotations / f'{name}.png', scene.semantic)


def _write_coco_split(root, split, scenes):
    (root / split).mkdir(parents=True)
    (root / 'annotations').mkdir(exist_ok=True)
    images, annotations = [], []
    for index, scene in enumerate(scenes, start=1):
        name = f'shapes_{split}_{index:08d}.jpg'
        _save(root / split / name, scene.image)
        height, width = scene.semantic.shape
        images.append(dict(id=index, file_name=name, height=height, width=width))
        for instance in scene.instances:
            x, y, w, h = cv2.boundingRect(instance.mask.astype(np.uint8))
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=index,
                    category_id=instance.label,
                    bbox=[x, y, w, h],
                    area=int(instance.mask.sum()),
                    segmentation=dict(size=[height, width], counts=_run_lengths(instance.mask)),
                    iscrowd=0,
                )
            )
    categories = [dict(id=i, name=name) for i, name in enumerate(CLASSES) if i > 0]
    content = dict(info={}, images=images, annotations=annotations, categories=categories)
    path = root / 'annotations' / f'instances_{split}.json'
    path.write_text(json.dumps(content))


def _run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed run lengths: column by column, the first run is of background."""
    flat = mask.flatten(order='F')
    ends = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], ends, [flat.size]])).tolist()
    return [0] + runs if flat[0] else runs
