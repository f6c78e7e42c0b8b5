import json

import pytest
from mmengine.registry import init_default_scope

from mmvim.datasets.shapes import write_coco
from mmvim.utils.launch import UserError

TRIANGLE = [[2.0, 2, 30, 2, 2, 30]]


@pytest.fixture
def root(tmp_path):
    write_coco(tmp_path / 'shapes', train=3, val=1, size=32)
    return tmp_path / 'shapes'


def change(root, edit) -> None:
    """Apply ``edit`` to the content of the training annotations."""
    path = root / 'annotations/instances_train.json'
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def dataset(root, **args):
    from mmvim.datasets import CheckedCocoDataset

    init_default_scope('mmdet')
    return CheckedCocoDataset(
        data_root=str(root),
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='train'),
        metainfo=dict(classes=('disc', 'square', 'triangle', 'star', 'ring', 'cross')),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(type='PackDetInputs', meta_keys=('img_path',)),
        ],
        **args,
    )


def test_what_the_generator_writes_is_read(root):
    data = dataset(root)
    assert len(data) == 3
    sample = data[0]['data_samples']
    assert len(sample.gt_instances) == len(sample.gt_instances.masks) > 0
    assert sample.gt_instances.masks.areas.min() > 0


def test_images_that_are_not_there_are_counted_and_named(root):
    (root / 'train/shapes_train_00000002.jpg').unlink()
    message = (
        r'instances_train.json names 1 of 3 images .*train/shapes_train_00000002.jpg\. .*data.md'
    )
    with pytest.raises(UserError, match=message):
        dataset(root)


def test_a_folder_that_is_not_there_misses_all_images(root):
    (root / 'train').rename(root / 'elsewhere')
    with pytest.raises(UserError, match='names 3 of 3 images'):
        dataset(root)


def test_images_elsewhere_are_not_looked_for(root):
    (root / 'train').rename(root / 'elsewhere')
    assert len(dataset(root, backend_args=dict(backend='local'))) == 3


def test_classes_that_the_file_lacks_are_counted(root):
    change(root, lambda content: content['categories'].pop())
    with pytest.raises(UserError, match='has 5 of the 6 classes .*metainfo.classes'):
        dataset(root)


@pytest.mark.parametrize('mask', [None, [], [[1.0, 2, 3, 4]], dict(size=[32, 32])])
def test_instances_without_a_mask_are_not_trained_on(root, mask):
    def edit(content):
        content['annotations'] = [
            dict(id=1, image_id=1, category_id=1, bbox=[2, 2, 28, 28], area=400, iscrowd=0),
            dict(id=2, image_id=1, category_id=2, bbox=[2, 2, 28, 28], area=400, iscrowd=0),
        ]
        content['annotations'][0]['segmentation'] = TRIANGLE
        if mask is not None:
            content['annotations'][1]['segmentation'] = mask

    change(root, edit)
    sample = dataset(root)[0]['data_samples']
    assert sample.gt_instances.labels.tolist() == [0]
    assert len(sample.ignored_instances) == 1


def test_degenerate_boxes_are_left_out(root):
    def edit(content):
        common = dict(image_id=1, category_id=1, segmentation=TRIANGLE, iscrowd=0)
        content['annotations'] = [
            dict(common, id=1, bbox=[2, 2, 28, 28], area=400),
            dict(common, id=2, bbox=[2, 2, 0, 28], area=400),
            dict(common, id=3, bbox=[2, 2, 28, 28], area=0),
            dict(common, id=4, bbox=[40, 2, 28, 28], area=400),
        ]

    change(root, edit)
    sample = dataset(root)[0]['data_samples']
    assert sample.gt_instances.bboxes.tensor.tolist() == [[2, 2, 30, 30]]
