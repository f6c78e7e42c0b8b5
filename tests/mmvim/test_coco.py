import json

import pytest
import torch
from mmengine.fileio import LocalBackend, register_backend
from mmengine.registry import init_default_scope

from mmvim.datasets.shapes import write_coco
from mmvim.utils.errors import UserError

CLASSES = ('disc', 'square', 'triangle', 'star', 'ring', 'cross')
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
        **{
            'data_root': str(root),
            'ann_file': 'annotations/instances_train.json',
            'data_prefix': dict(img='train'),
            'metainfo': dict(classes=CLASSES),
            'pipeline': [
                dict(type='LoadImageFromFile'),
                dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
                dict(type='PackDetInputs', meta_keys=('img_path',)),
            ],
            **args,
        }
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


@pytest.fixture
def elsewhere():
    """A storage backend that is not this machine's file system, by name at least."""
    register_backend('elsewhere', type('Elsewhere', (LocalBackend,), {}), force=True)
    return dict(backend='elsewhere')


def test_images_elsewhere_are_not_looked_for(root, elsewhere):
    (root / 'train').rename(root / 'elsewhere')
    with pytest.raises(UserError, match='names 3 of 3 images'):
        dataset(root, backend_args=dict(backend='local'))
    assert len(dataset(root, backend_args=elsewhere)) == 3
    reads_elsewhere = [dict(type='LoadImageFromFile', backend_args=elsewhere)]
    assert len(dataset(root, pipeline=reads_elsewhere)) == 3
    assert len(dataset(root, data_prefix=dict(img='s3://bucket/train'))) == 3


def test_classes_that_the_file_lacks_are_counted(root):
    def edit(content):
        last = content['categories'].pop()['id']
        kept = [a for a in content['annotations'] if a['category_id'] != last]
        content['annotations'] = kept

    change(root, edit)
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


# The annotation file ---------------------------------------------------------------------------


def four_objects(**changes) -> dict:
    """Annotations of one image; a key of ``changes`` is set to its values, one for each."""
    boxes = [[2, 2, 8, 8], [14, 2, 8, 8], [2, 14, 8, 8], [14, 14, 8, 8]]
    annotations = [
        dict(id=i + 1, image_id=1, category_id=1, bbox=box, area=64, iscrowd=0)
        for i, box in enumerate(boxes)
    ]
    for key, values in changes.items():
        for annotation, value in zip(annotations, values, strict=True):
            annotation[key] = value
            if value is None:
                del annotation[key]
    return dict(
        images=[dict(id=1, file_name='a.jpg', height=32, width=32)],
        categories=[dict(id=1, name='disc'), dict(id=2, name='square')],
        annotations=annotations,
    )


def write(folder, content) -> str:
    path = folder / 'annotations.json'
    path.write_text(json.dumps(content))
    return str(path)


def perfect_ap(metric_class, ann_file: str) -> float:
    """AP of a detector that finds every object of :func:`four_objects`."""
    metric = metric_class(ann_file=ann_file)
    metric.dataset_meta = dict(classes=('disc', 'square'))
    boxes = torch.tensor([[2.0, 2, 10, 10], [14, 2, 22, 10], [2, 14, 10, 22], [14, 14, 22, 22]])
    found = dict(bboxes=boxes, scores=torch.ones(4), labels=torch.zeros(4, dtype=torch.long))
    metric.process({}, [dict(img_id=1, ori_shape=(32, 32), pred_instances=found)])
    return metric.evaluate(size=1)['coco/bbox_mAP']


@pytest.mark.parametrize(
    'change',
    [
        dict(id=[1, 2, 3, 0]),
        dict(id=[1, 1, 2, 2]),
        dict(id=[None] * 4),
        dict(id=['a', 'b', 'c', 'd']),
        dict(area=[None] * 4),
        dict(iscrowd=[None, 0, 0, None]),
    ],
)
def test_a_perfect_detector_is_found_perfect(tmp_path, change):
    from mmvim.datasets import CheckedCocoMetric

    ann_file = write(tmp_path, four_objects(**change))
    assert perfect_ap(CheckedCocoMetric, ann_file) == pytest.approx(1.0)


def test_mmdet_alone_gives_a_perfect_detector_three_quarters(tmp_path):
    """Why ids are numbered anew: when this fails, mmdet no longer needs it."""
    from mmdet.evaluation import CocoMetric

    ann_file = write(tmp_path, four_objects(id=[1, 2, 3, 0]))
    assert perfect_ap(CocoMetric, ann_file) == pytest.approx(0.75, abs=0.01)


def test_areas_are_those_of_the_masks(tmp_path):
    from mmvim.datasets.coco_file import CheckedCoco

    square = [[2, 2, 10, 2, 10, 10, 2, 10]]
    rle = dict(size=[32, 32], counts=[0, 6, 32 * 32 - 6])
    content = four_objects(area=[None] * 4, segmentation=[square, rle, [], [[1, 2, 3, 4]]])
    coco = CheckedCoco(write(tmp_path, content))
    assert [coco.anns[i]['area'] for i in (1, 2, 3, 4)] == [64, 6, 64, 64]


def test_what_was_mended_is_counted():
    from mmvim.datasets.coco_file import mend_annotations

    assert mend_annotations(four_objects()) == []
    content = four_objects(id=[0, 7, 7, 9], area=[None, 64, 64, 64], iscrowd=[None, None, 1, 0])
    mended = mend_annotations(content)
    assert [text.split()[0] for text in mended] == ['3', '1', '2']
    assert [annotation['id'] for annotation in content['annotations']] == [1, 2, 3, 4]
    assert content['annotations'][2]['iscrowd'] == 1


def test_training_data_are_mended_too(root):
    def edit(content):
        for annotation in content['annotations']:
            del annotation['area'], annotation['iscrowd']
            annotation['id'] = 0

    def boxes() -> list:
        data = dataset(root)
        return [[i['bbox'] for i in data.get_data_info(n)['instances']] for n in range(len(data))]

    before = boxes()
    change(root, edit)
    assert boxes() == before


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('', 'annotations.json is no annotation file of COCO'),
        ('[]', 'annotations.json is no annotation file of COCO'),
        (dict(four_objects(), images=[]), 'annotations.json lists no images'),
        (
            four_objects(bbox=[None, None, [0, 0, 1, 1], [0, 0, 1, 1]]),
            '2 of 4 annotations lack bbox',
        ),
        (four_objects(bbox=[[1, 2, 3]] * 4), '4 annotations have a bbox that is none'),
        (
            four_objects(bbox=[[1, 2, 3, float('nan')]] * 4),
            '4 annotations have a bbox that is none',
        ),
        (
            four_objects(category_id=[0, 0, 0, 1]),
            '3 annotations have a category_id .* 2 categories',
        ),
        (
            dict(four_objects(), images=four_objects()['images'] * 2),
            '1 ids of images are used more than once',
        ),
        (dict(four_objects(), images=[dict(id=1, file_name='a.jpg')]), '1 of 1 images lack height'),
    ],
)
def test_files_that_cannot_be_mended_are_refused(tmp_path, content, message):
    from mmvim.datasets.coco_file import CheckedCoco

    path = write(tmp_path, content)
    if isinstance(content, str):
        (tmp_path / 'annotations.json').write_text(content)
    with pytest.raises(UserError, match=message) as refusal:
        CheckedCoco(path)
    assert 'annotations.json' in str(refusal.value)


def test_an_evaluation_without_annotations_is_refused_at_its_start(tmp_path):
    from mmvim.datasets import CheckedCocoMetric

    ann_file = write(tmp_path, dict(four_objects(), annotations=[]))
    with pytest.raises(UserError, match='annotations.json has no annotations'):
        CheckedCocoMetric(ann_file=ann_file)
    CheckedCocoMetric(ann_file=ann_file, format_only=True, outfile_prefix=str(tmp_path / 'out'))


def test_an_evaluator_of_other_classes_is_refused_at_its_start(tmp_path):
    from mmvim.datasets import CheckedCocoMetric

    metric = CheckedCocoMetric(ann_file=write(tmp_path, four_objects()))
    with pytest.raises(UserError, match='annotations.json has 1 of the 2 classes'):
        metric.dataset_meta = dict(classes=('disc', 'star'))


def test_classes_in_another_order_would_get_wrong_names(root):
    with pytest.raises(UserError, match=r"another order .* write classes=\('disc', 'square'"):
        dataset(root, metainfo=dict(classes=CLASSES[::-1]))


def test_training_data_without_any_object_are_refused(root):
    change(root, lambda content: content.update(annotations=[]))
    with pytest.raises(UserError, match='none of its 3 images can be used'):
        dataset(root, filter_cfg=dict(filter_empty_gt=True, min_size=32))


def test_sorted_categories_are_those_of_mmdet(tmp_path):
    from mmdet.evaluation import CocoMetric

    from mmvim.datasets import CheckedCocoMetric

    content = four_objects()
    content['categories'].reverse()
    ann_file = write(tmp_path, content)
    theirs, ours = (
        kind(ann_file=ann_file, sort_categories=True)._coco_api
        for kind in (CocoMetric, CheckedCocoMetric)
    )
    assert list(theirs.cats) == list(ours.cats) == [1, 2]
    assert theirs.dataset['categories'] == ours.dataset['categories']
