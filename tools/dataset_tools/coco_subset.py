"""Copy a few images' part of a COCO annotation file, to try things out on: the images stay."""

import argparse
import json
import sys
from pathlib import Path


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'source', type=Path, help='annotation file, such as instances_train2017.json'
    )
    parser.add_argument('out', type=Path, help='annotation file to write')
    parser.add_argument(
        '--images', nargs='+', type=int, required=True, metavar='ID', help='ids of the images'
    )
    return parser.parse_args()


def subset(content: dict, ids: set[int]) -> dict:
    """The annotations of some images; the categories stay complete.

    Raises:
        ValueError: An image is not among the annotated ones; the message names it.
    """
    missing = ids - {image['id'] for image in content['images']}
    if missing:
        raise ValueError(f'no such image: {", ".join(map(str, sorted(missing)))}')
    images = [image for image in content['images'] if image['id'] in ids]
    annotations = [a for a in content['annotations'] if a['image_id'] in ids]
    return {**content, 'images': images, 'annotations': annotations}


def main() -> None:
    args = parse_args()
    try:
        content = subset(json.loads(args.source.read_text()), set(args.images))
        args.out.write_text(json.dumps(content))
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f'coco_subset: {args.source}: {error}')
    print(f'{len(content["images"])} images, {len(content["annotations"])} objects: {args.out}')


if __name__ == '__main__':
    main()
