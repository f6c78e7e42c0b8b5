"""What is written for a picture, beyond what ``tests/tools/test_predict.py`` reads back."""

import csv
import os
from pathlib import Path, PurePath
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData
from PIL import Image

from mmvim.apis.drawing import draw_instances, draw_label_map
from mmvim.apis.inputs import Source
from mmvim.apis.outputs import Classes, LabelMaps
from mmvim.utils.launch import UserError

SOURCE = Source(Path('photos/a b.jpg'), PurePath('trip/a b'))


class Sample(SimpleNamespace):
    def __contains__(self, name: str) -> bool:
        return name in self.__dict__


def label_map(labels: np.ndarray) -> Sample:
    return Sample(pred_sem_seg=SimpleNamespace(data=torch.from_numpy(labels)[None]))


def test_the_most_likely_classes_are_a_row_of_a_table(tmp_path):
    names = ['cat', 'dog', 'a "quoted", name', 'cow', 'hen', 'pig']
    picture = np.full((60, 80, 3), 90, np.uint8)
    with Classes(tmp_path, dict(classes=names, palette=None)) as results:
        scores = torch.tensor([0.1, 0.2, 0.4, 0.02, 0.23, 0.05])
        results.add(SOURCE, picture, Sample(pred_score=scores))
    with open(tmp_path / 'classes.csv', newline='') as file:
        (row,) = csv.DictReader(file)
    assert row['file'] == 'photos/a b.jpg'
    assert (row['label'], row['class'], row['score']) == ('2', 'a "quoted", name', '0.4000')
    assert [row[f'class_{k}'] for k in range(2, 6)] == ['hen', 'dog', 'cat', 'pig']
    with Image.open(tmp_path / 'pictures' / 'trip' / 'a b.jpg') as image:
        assert image.size == (80, 60)
        assert np.asarray(image)[:10, :20].max() > 200  # the text is white


def test_a_table_has_names_of_files_as_they_are(tmp_path):
    path = Path(os.fsdecode(b'caf\xe9.jpg'))  # no text in UTF-8
    with Classes(tmp_path, dict(classes=['cat'], palette=None), draw=False) as results:
        sample = Sample(pred_score=torch.ones(1))
        results.add(Source(path, PurePath('a')), np.zeros((4, 4, 3), np.uint8), sample)
    assert b'caf\xe9.jpg,0,cat' in (tmp_path / 'classes.csv').read_bytes()


def test_more_classes_than_a_palette_holds_are_written_with_16_bits(tmp_path):
    count = 300
    meta = dict(
        classes=[str(k) for k in range(count)], palette=[(k % 256, 0, 9) for k in range(count)]
    )
    labels = np.arange(count).reshape(15, 20)
    with LabelMaps(tmp_path, meta, draw=False) as results:
        results.add(SOURCE, np.zeros((15, 20, 3), np.uint8), label_map(labels))
    with Image.open(tmp_path / 'labels' / 'trip' / 'a b.png') as image:
        np.testing.assert_array_equal(np.asarray(image), labels)
    assert not (tmp_path / 'pictures').exists()


def test_a_model_without_label_maps_is_refused(tmp_path):
    results = LabelMaps(tmp_path, dict(classes=['a'], palette=[(0, 0, 0)]))
    with results, pytest.raises(UserError, match='pred_sem_seg'):
        results.add(SOURCE, np.zeros((4, 4, 3), np.uint8), Sample(pred_depth_map=None))


@pytest.mark.parametrize('opacity', [0.0, 0.25, 1.0])
def test_opacity_is_the_part_of_the_colour(opacity):
    picture = np.full((40, 40, 3), 200, np.uint8)
    labels = np.zeros((40, 40), np.int64)
    labels[:, 20:] = 1
    palette = np.array([[0, 0, 0], [100, 60, 20]], np.uint8)
    drawn = np.asarray(draw_label_map(picture, labels, ['', ''], palette, opacity))
    expected = 200 * (1 - opacity) + opacity * palette[labels].astype(float)
    np.testing.assert_allclose(drawn[[0, -1]], expected[[0, -1]], atol=1)  # names are in the middle


def test_names_are_written_into_their_largest_regions_only():
    picture = np.zeros((200, 200, 3), np.uint8)
    labels = np.zeros((200, 200), np.int64)
    labels[20:100, 30:130] = 1
    labels[180:184, 180:184] = 2  # too small for a name
    palette = np.array([[50, 50, 50], [10, 200, 10], [200, 10, 10]], np.uint8)
    drawn = np.asarray(draw_label_map(picture, labels, ['ground', 'lawn', 'roof'], palette, 1.0))
    changed = (drawn != palette[labels]).any(-1)
    assert changed[50:70, 60:100].any(), 'a name in the middle of the lawn'
    assert not changed[170:, 170:].any(), 'none on the roof'


def detections(boxes: list, labels: list, scores: list, masks: np.ndarray) -> Sample:
    instances = InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32),
        labels=torch.tensor(labels),
        scores=torch.tensor(scores),
        masks=masks,
    )
    return Sample(pred_instances=instances)


def count(image: Image.Image, colour: tuple) -> int:
    return int((np.asarray(image) == colour).all(2).sum())


def test_names_of_detections_at_one_place_do_not_hide_each_other():
    red, blue = (200, 0, 0), (0, 0, 200)
    meta = dict(classes=['cat', 'dog'], palette=[red, blue])
    picture = np.zeros((200, 300, 3), np.uint8)
    masks = np.zeros((2, 200, 300), bool)
    boxes = [[50, 50, 150, 150]] * 2
    one = draw_instances(picture, detections(boxes, [0, 0], [0.9, 0.8], masks), meta, 0.5)
    both = draw_instances(picture, detections(boxes, [0, 1], [0.9, 0.8], masks), meta, 0.5)
    name = count(one, red) - count(both, red)
    assert name > 300  # of the two red names one was blue, and all of it is there
    assert abs(count(both, blue) - name) < 0.5 * name


def test_masks_are_blended_and_have_an_outline():
    meta = dict(classes=['cat'], palette=[(200, 0, 0)])
    picture = np.full((200, 300, 3), 100, np.uint8)
    masks = np.zeros((1, 200, 300), bool)
    masks[0, 60:140, 60:140] = True
    sample = detections([[60, 60, 139, 139]], [0], [0.5], masks)
    pixels = np.asarray(draw_instances(picture, sample, meta, 0.25))
    assert tuple(pixels[100, 100]) == (125, 75, 75)
    assert tuple(pixels[100, 60]) == (200, 0, 0)
    assert tuple(pixels[100, 150]) == (100, 100, 100)
