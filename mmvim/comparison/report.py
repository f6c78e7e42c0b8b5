"""Tables, curves and pictures of a comparison."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmvim.apis.drawing import draw_label_map
from mmvim.apis.outputs import OPACITY
from mmvim.utils.errors import UserError

__all__ = [
    'confusion',
    'contact_sheet',
    'draw_confusion',
    'draw_curves',
    'draw_labels',
    'ious',
    'table',
]

Results = dict[str, dict[int, dict]]  # side: seed: result of the run


def table(results: Results, seeds: Sequence[int], key: str, name: str) -> str:
    """Markdown: one row per side, a metric per seed, their mean and standard deviation."""
    header = [name, 'backbone parameters', *(f'seed {seed}' for seed in seeds), 'mean', 'spread']
    lines = [f'| {" | ".join(header)} |', '| --- |' + ' ---: |' * (len(header) - 1)]
    for side, runs in results.items():
        found = [runs[seed]['metrics'][key] for seed in seeds if seed in runs]
        sizes = {run['parameters'] for run in runs.values()}
        cells = [' / '.join(f'{size:,}' for size in sorted(sizes))]
        cells += [f'{runs[seed]["metrics"][key]:.1f}' if seed in runs else '' for seed in seeds]
        cells.append(f'{statistics.mean(found):.1f}' if found else '')
        cells.append(f'{statistics.stdev(found):.1f}' if len(found) > 1 else '')
        lines.append(f'| `{side}` | {" | ".join(cells)} |')
    return '\n'.join(lines) + '\n'


def confusion(labels: Path, predictions: Path, classes: int) -> np.ndarray:
    """Pixels (classes, classes) of each class, down, that were called each class, across.

    Args:
        labels (Path): Folder of label maps; values from ``classes`` on are ignored.
        predictions (Path): Folder of label maps of the same names.
        classes (int): Their number.

    Raises:
        UserError: There is no prediction of a label map, or it has another size.
    """
    total = np.zeros((classes, classes), np.int64)
    for path in sorted(labels.glob('*.png')):
        other = predictions / path.name
        if not other.is_file():
            raise UserError(f'{predictions} has no prediction of {path.name}')
        label, predicted = np.array(Image.open(path)), np.array(Image.open(other))  # (H, W)
        if label.shape != predicted.shape:
            raise UserError(f'{path} is {label.shape}, {other} is {predicted.shape}')
        counts = label < classes
        pairs = classes * label[counts].astype(np.int64) + predicted[counts]
        total += np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
    return total


def ious(matrix: np.ndarray) -> list[float]:
    """Percent of intersection over union of each class of a confusion matrix (classes, classes)."""
    both = matrix.diagonal()
    union = matrix.sum(axis=0) + matrix.sum(axis=1) - both
    return (100 * both / np.maximum(union, 1)).tolist()


def draw_confusion(matrices: dict[str, np.ndarray], classes: Sequence[str], path: Path) -> None:
    """One matrix beside the other, each row in percent of the pixels of its class."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(matrices), 5.5), layout='constrained')
    for axes, (side, matrix) in zip(
        np.atleast_1d(figure.subplots(1, len(matrices))), matrices.items(), strict=True
    ):
        percent = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        axes.imshow(percent, cmap='Blues', vmin=0, vmax=100)
        for (row, column), value in np.ndenumerate(percent):
            if value >= 1:
                colour = 'white' if value > 50 else 'black'
                axes.text(column, row, f'{value:.0f}', ha='center', va='center', color=colour)
        axes.set_xticks(range(len(classes)), classes, rotation=60, ha='right')
        axes.set_yticks(range(len(classes)), classes)
        axes.set(title=side, xlabel='predicted', ylabel='pixels of')
    figure.savefig(path, dpi=100)


def draw_curves(curves: dict[str, list[dict[int, float]]], name: str, path: Path) -> None:
    """A quantity against the steps of the trainings, a colour per side and a line per seed.

    Args:
        curves (dict[str, list[dict[int, float]]]): Step: value of each seed of each side.
        name (str): Of the quantity.
        path (Path): The picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.subplots()
    for number, (side, lines) in enumerate(curves.items()):
        for line in lines:
            label = side if line is lines[0] else None
            smooth = _smooth(list(line.values()))
            axes.plot(list(line), smooth, color=f'C{number % 10}', label=label, alpha=0.8)
    axes.set(xlabel='step', ylabel=name)
    axes.grid(alpha=0.3)
    if curves:
        axes.legend()
    figure.savefig(path, dpi=100)


def _smooth(values: Sequence[float], width: int = 10) -> list[float]:
    """Mean of each value and those before it, ``width`` in all; short curves as they are."""
    if len(values) < 3 * width:
        return list(values)
    return [statistics.mean(values[max(0, k - width + 1) : k + 1]) for k in range(len(values))]


def draw_labels(
    image: Path, labels: Path, classes: Sequence[str], palette: Sequence, path: Path
) -> None:
    """An image under the colours of its label map; values that no class has are black."""
    indices = np.minimum(np.array(Image.open(labels)), len(classes))  # (H, W)
    colours = np.array([*palette, (0, 0, 0)], np.uint8)
    picture = np.array(Image.open(image).convert('RGB'))
    draw_label_map(picture, indices, [*classes, 'void'], colours, OPACITY).save(path)


def contact_sheet(columns: dict[str, Sequence[Path]], path: Path, height: int = 240) -> None:
    """Pictures in a grid: a titled column for each entry, a row for each of its pictures."""
    title = 24
    grid = {
        name: [_at_height(Image.open(file).convert('RGB'), height) for file in files]
        for name, files in columns.items()
    }
    rows = max(map(len, grid.values()))
    widths = {name: max(picture.width for picture in pictures) for name, pictures in grid.items()}
    sheet = Image.new('RGB', (sum(widths.values()), title + rows * height), 'white')
    draw, font, left = ImageDraw.Draw(sheet), ImageFont.load_default(16), 0
    for name, pictures in grid.items():
        draw.text((left + 4, 2), name, fill='black', font=font)
        for row, picture in enumerate(pictures):
            sheet.paste(picture, (left, title + row * height))
        left += widths[name]
    sheet.save(path)


def _at_height(picture: Image.Image, height: int) -> Image.Image:
    return picture.resize((max(1, round(picture.width * height / picture.height)), height))
