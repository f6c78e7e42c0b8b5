"""Draw effective receptive fields and feature maps of trained backbones on the same images.

``python tools/analysis_tools/look_inside.py IMAGES --model vim CONFIG CHECKPOINT --model deit …``
writes receptive_field.png (mean over the images, logarithmic colours), features.png (the three
principal components of the last map) and receptive_field.json: the least share of the pixels that
has 50, 90 and 99 % of what the centre of the last map depends on.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import mmvim  # noqa: F401  (registers the models)
from mmvim.apis import PictureError, load_model, read_picture
from mmvim.apis.inputs import find_pictures
from mmvim.comparison.inside import (
    normalise,
    principal_colours,
    receptive_field,
    share_of_area,
)
from mmvim.comparison.report import contact_sheet
from mmvim.utils import guard_checkpoints
from mmvim.utils.launch import UserError, run

PARTS = (0.5, 0.9, 0.99)
SHOWN = 6  # images in features.png


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('inputs', nargs='+', metavar='INPUT', help='pictures and folders')
    parser.add_argument(
        '--model',
        nargs=3,
        action='append',
        required=True,
        metavar=('NAME', 'CONFIG', 'CHECKPOINT'),
        help='may be given several times',
    )
    parser.add_argument('--out-dir', type=Path, default=Path('inside'), help='default: %(default)s')
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        metavar=('H', 'W'),
        help='size that the pictures are brought to (default: that of the first)',
    )
    parser.add_argument('--device', help='default: a GPU if there is one, else the CPU')
    args = parser.parse_args()
    if args.shape is not None and min(args.shape) < 1:
        parser.error(f'--shape must be positive, got {args.shape[0]} {args.shape[1]}')
    names = [name for name, _, _ in args.model]
    if len(set(names)) < len(names):
        parser.error(f'--model needs names that differ, got {", ".join(names)}')
    for name in names:  # files and columns are called so
        if Path(name).name != name or name == 'image':
            parser.error(f"--model needs names of files, and not 'image', got {name}")
    if args.out_dir.exists() and not args.out_dir.is_dir():
        parser.error(f'--out-dir must be a folder, and {args.out_dir} is a file')
    return args


def load_pictures(inputs: list[str], out_dir: Path) -> list[Image.Image]:
    """All pictures among files and folders, RGB."""
    sources, skipped = find_pictures(inputs, out_dir)
    if not sources:
        why = ''.join(f'; {entry.path}: {entry.reason}' for entry in skipped)
        raise UserError(f'there is no picture in {", ".join(inputs)}{why}')
    pictures = []
    for source in sources:
        try:
            pictures.append(Image.fromarray(read_picture(source.path)))
        except PictureError as error:
            raise UserError(f'{source.path}: {error}') from None
    return pictures


def draw_fields(fields: dict[str, np.ndarray], path: Path) -> None:
    """Receptive fields (H, W) beside each other, on one logarithmic scale."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(fields) + 1, 4.2), layout='constrained')
    highest = max(field.max() for field in fields.values())
    scale = LogNorm(vmin=1e-4 * highest, vmax=highest, clip=True)
    panels = np.atleast_1d(figure.subplots(1, len(fields)))
    for axes, (name, field) in zip(panels, fields.items(), strict=True):
        shown = axes.imshow(field, cmap='viridis', norm=scale)
        axes.set(title=f'{name}: 90 % within {100 * share_of_area(field, 0.9):.0f} % of the pixels')
        axes.axis('off')
    figure.colorbar(shown, ax=list(panels), label='share of the gradient')
    figure.savefig(path, dpi=100)


def main() -> None:
    args = parse_args()
    guard_checkpoints(trust=False)
    pictures = load_pictures(args.inputs, args.out_dir)
    height, width = args.shape or pictures[0].size[::-1]
    images = [np.array(picture.resize((width, height))) for picture in pictures]

    maps = args.out_dir / 'maps'
    maps.mkdir(parents=True, exist_ok=True)
    fields, columns = {}, {'image': []}
    for k, picture in enumerate(pictures[:SHOWN]):  # as read: upright, on white, of 8 bits
        columns['image'].append(maps / f'image_{k}.png')
        picture.save(columns['image'][-1])
    for name, config, checkpoint in args.model:
        model = load_model(config, checkpoint, args.device)
        preprocessor, backbone = model.data_preprocessor, model.backbone
        inputs = [normalise(image, preprocessor) for image in images]
        try:
            fields[name] = np.mean([receptive_field(backbone, image) for image in inputs], axis=0)
        except ValueError as error:
            raise UserError(f'{config}: {error}') from None
        columns[name] = []
        for k, image in enumerate(inputs[:SHOWN]):
            with torch.no_grad():
                colours = principal_colours(backbone(image)[-1])
            columns[name].append(maps / f'{name}_{k}.png')
            map_size = (width, height)
            Image.fromarray(colours).resize(map_size, Image.NEAREST).save(columns[name][-1])
    shares = {
        name: {f'{100 * part:.0f} %': share_of_area(field, part) for part in PARTS}
        for name, field in fields.items()
    }
    draw_fields(fields, args.out_dir / 'receptive_field.png')
    contact_sheet(columns, args.out_dir / 'features.png')
    content = dict(images=len(images), shape=[height, width], share_of_area=shares)
    (args.out_dir / 'receptive_field.json').write_text(json.dumps(content, indent=2) + '\n')
    for name, values in shares.items():
        print(name, ', '.join(f'{p} in {100 * v:.1f} % of the pixels' for p, v in values.items()))


if __name__ == '__main__':
    run(main)
