"""The generated shapes: reproducible, learnable, complete or absent, and readable by others."""

import json
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest

from mmvim.datasets import shapes
from mmvim.datasets.shapes import CLASSES, PALETTE, draw_scene, read_meta, write_ade20k, write_coco

SMALL = dict(train=3, val=2, size=64)
SCRIPT = Path(__file__).parents[2] / 'tools/dataset_tools/make_shapes.py'


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob('*') if p.is_file()}


def scenes(count: int, size: int = 96) -> list[shapes.Scene]:
    return [draw_scene(np.random.default_rng([7, index]), size) for index in range(count)]


@pytest.fixture(scope='module')
def ade20k(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp('shapes') / 'ade20k'
    write_ade20k(root, train=6, val=40, size=64)
    return root


@pytest.fixture(scope='module')
def coco(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp('shapes') / 'coco'
    write_coco(root, **SMALL)
    return root


# ------------------------------------------------------------------------------------- scenes


def test_classes_and_colours_are_distinct():
    assert len(set(CLASSES)) == len(CLASSES) == len({tuple(colour) for colour in PALETTE})


def test_scene_shows_two_to_five_shapes_none_of_them_tiny_or_overlapping():
    for scene in scenes(60):
        assert 2 <= len(scene.instances) <= 5
        covered = sum(instance.mask.astype(int) for instance in scene.instances)
        assert covered.max() == 1
        assert min(np.count_nonzero(instance.mask) for instance in scene.instances) > 96**2 / 100


def test_paired_palette_gives_two_outlines_the_same_hues_and_changes_nothing_else():
    hues = {name: [] for name in CLASSES[1:]}
    for index in range(40):
        own, paired = (
            draw_scene(np.random.default_rng([7, index]), 64, palette)
            for palette in ('class', 'paired')
        )
        assert np.array_equal(own.semantic, paired.semantic)
        hsv = cv2.cvtColor(paired.image, cv2.COLOR_BGR2HSV)
        for instance in paired.instances:
            hue = np.median(2.0 * hsv[..., 0][instance.mask])  # OpenCV counts in steps of 2 degrees
            hues[CLASSES[instance.label]].append(int((hue + 60) // 120) % 3)
    family = {name: int(np.bincount(seen).argmax()) for name, seen in hues.items()}
    assert family == dict(disc=0, ring=0, square=1, cross=1, triangle=2, star=2)
    with pytest.raises(ValueError, match="palette must be one of .*'paired'.* not 'grey'"):
        write_ade20k('nowhere', palette='grey')


def test_semantic_map_agrees_with_the_instances_except_where_it_is_unlabelled():
    for scene in scenes(10):
        expected = np.ones_like(scene.semantic)
        for instance in scene.instances:
            expected[instance.mask] = instance.label + 1
        labelled = scene.semantic > 0
        assert 0.9 < labelled.mean() < 1
        np.testing.assert_array_equal(scene.semantic[labelled], expected[labelled])


def test_every_class_covers_about_as_many_pixels():
    pixels = np.bincount(
        np.concatenate([scene.semantic.ravel() for scene in scenes(200, size=48)]),
        minlength=len(CLASSES) + 1,
    )
    shares = pixels[2:] / pixels[2:].mean()
    assert shares.min() > 0.75 and shares.max() < 1.25


def test_shape_has_the_same_area_in_every_class():
    for name, contours in shapes._OUTLINES.items():
        outer, *holes = [cv2.contourArea(c.astype(np.float32)) for c in contours]
        assert outer - sum(holes) == pytest.approx(1, abs=1e-4), name


# ---------------------------------------------------------------------------- the folder itself


def test_same_seed_gives_the_same_bytes(tmp_path):
    for name in 'ab':
        write_ade20k(tmp_path / name, **SMALL)
    write_ade20k(tmp_path / 'c', **SMALL, seed=1)
    a, b, c = (files(tmp_path / name) for name in 'abc')
    assert a == b
    assert all(a[name] != c[name] for name in a)


def test_an_image_does_not_depend_on_how_many_there_are(tmp_path):
    write_ade20k(tmp_path / 'few', **SMALL)
    write_ade20k(tmp_path / 'more', **{**SMALL, 'train': 5})
    few, more = files(tmp_path / 'few'), files(tmp_path / 'more')
    few.pop('meta.json')
    assert few.items() <= more.items()


def test_training_and_held_out_images_differ(ade20k):
    images = [cv2.imread(str(path)) for path in sorted((ade20k / 'images').rglob('*.jpg'))]
    assert len({image.tobytes() for image in images}) == len(images) == 46


def test_ade20k_layout_pairs_each_image_with_an_annotation_of_known_values(ade20k):
    for folder, count in (('training', 6), ('validation', 40)):
        images = sorted((ade20k / 'images' / folder).iterdir())
        annotations = sorted((ade20k / 'annotations' / folder).iterdir())
        assert [p.stem for p in images] == [p.stem for p in annotations]
        assert len(images) == count
        for path in annotations:
            labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            assert labels.shape == (64, 64) and labels.dtype == np.uint8
            assert labels.max() <= len(CLASSES)


def test_every_class_is_held_out_and_counted(ade20k):
    maps = [
        cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        for path in (ade20k / 'annotations/validation').iterdir()
    ]
    counts = np.bincount(np.concatenate(maps).ravel(), minlength=len(CLASSES) + 1)
    assert counts.min() > 0
    assert read_meta(ade20k)['pixels']['val'] == counts.tolist()


def test_nothing_is_done_when_the_same_data_is_there(tmp_path):
    assert write_ade20k(tmp_path / 'shapes', **SMALL)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')}
    assert not write_ade20k(tmp_path / 'shapes', **SMALL)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')} == before


def test_other_shapes_are_replaced_only_on_request(tmp_path):
    root = tmp_path / 'shapes'
    write_ade20k(root, **SMALL)
    before = files(root)
    with pytest.raises(FileExistsError, match='overwrite'):
        write_coco(root, **SMALL)
    assert files(root) == before
    assert write_coco(root, **SMALL, overwrite=True)
    assert read_meta(root)['arguments']['format'] == 'coco'
    assert not (root / 'images').exists()
    assert list(tmp_path.iterdir()) == [root]


@pytest.mark.parametrize('overwrite', [False, True])
def test_a_folder_of_something_else_is_never_touched(tmp_path, overwrite):
    root = tmp_path / 'shapes'
    (root / 'images').mkdir(parents=True)
    (root / 'images' / 'mine.jpg').write_bytes(b'holiday')
    with pytest.raises(FileExistsError, match='not generated here'):
        write_ade20k(root, **SMALL, overwrite=overwrite)
    assert files(root) == {'images/mine.jpg': b'holiday'}


def test_an_interrupted_run_leaves_nothing_and_keeps_what_it_would_replace(tmp_path):
    def interrupted(indices):
        yield indices[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_ade20k(tmp_path / 'shapes', **SMALL, progress=interrupted)
    assert list(tmp_path.iterdir()) == []

    write_ade20k(tmp_path / 'shapes', **SMALL)
    before = files(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        write_ade20k(tmp_path / 'shapes', seed=1, overwrite=True, progress=interrupted)
    assert files(tmp_path) == before


@pytest.mark.parametrize('argument', [dict(size=31), dict(train=0), dict(val=0), dict(seed=-1)])
def test_nonsense_is_refused_by_name(tmp_path, argument):
    (name,) = argument
    with pytest.raises(ValueError, match=name):
        write_ade20k(tmp_path / 'shapes', **{**SMALL, **argument})
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------- its readers


def decoded(segmentation: dict) -> np.ndarray:
    """The mask behind uncompressed run lengths, from the format's definition."""
    values = np.arange(len(segmentation['counts'])) % 2
    flat = np.repeat(values, segmentation['counts'])
    return flat.reshape(segmentation['size'], order='F').astype(bool)


def test_coco_boxes_and_areas_fit_the_masks(coco):
    content = json.loads((coco / 'annotations/instances_train.json').read_text())
    assert [category['name'] for category in content['categories']] == list(CLASSES[1:])
    assert {path.name for path in (coco / 'train').iterdir()} == {
        image['file_name'] for image in content['images']
    }
    for annotation in content['annotations']:
        mask = decoded(annotation['segmentation'])
        rows, columns = np.nonzero(mask)
        x, y, w, h = annotation['bbox']
        assert annotation['area'] == np.count_nonzero(mask) > 0
        assert (x, y) == (columns.min(), rows.min())
        assert (x + w, y + h) == (columns.max() + 1, rows.max() + 1)


def test_coco_masks_are_those_of_the_scene(coco):
    content = json.loads((coco / 'annotations/instances_val.json').read_text())
    for image in content['images']:
        rng = np.random.default_rng([0, 1, image['id'] - 1])
        instances = draw_scene(rng, SMALL['size']).instances
        written = [a for a in content['annotations'] if a['image_id'] == image['id']]
        assert [a['category_id'] for a in written] == [i.label for i in instances]
        for annotation, instance in zip(written, instances, strict=True):
            np.testing.assert_array_equal(decoded(annotation['segmentation']), instance.mask)


def test_run_lengths_of_a_mask_that_starts_in_the_corner_begin_with_an_empty_run():
    assert shapes._run_lengths(np.array([[True, False], [True, True]])) == [0, 2, 1, 1]


@pytest.mark.skipif(find_spec('mmseg') is None, reason='needs mmseg')
def test_mmseg_reads_the_labels_with_the_zero_class_ignored(ade20k):
    from mmseg.registry import DATASETS

    import mmvim.datasets.shapes_dataset  # noqa: F401  (registers it)

    dataset = DATASETS.build(
        dict(
            type='mmseg.ShapesDataset',
            data_root=str(ade20k),
            data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
            pipeline=[
                dict(type='mmseg.LoadImageFromFile'),
                dict(type='mmseg.LoadAnnotations', reduce_zero_label=True),
            ],
        )
    )
    assert len(dataset) == 40
    assert dataset.metainfo['classes'] == CLASSES
    scene = draw_scene(np.random.default_rng([0, 1, 0]), 64)
    expected = np.where(scene.semantic == 0, 255, scene.semantic - 1)
    np.testing.assert_array_equal(dataset[0]['gt_seg_map'], expected)
    assert np.abs(dataset[0]['img'].astype(int) - scene.image).mean() < 10  # JPEG


@pytest.mark.skipif(find_spec('mmdet') is None, reason='needs mmdet')
def test_mmdet_reads_the_masks(coco):
    from mmcv.transforms import LoadImageFromFile
    from mmdet.datasets import CocoDataset
    from mmdet.datasets.transforms import LoadAnnotations

    dataset = CocoDataset(
        data_root=str(coco),
        ann_file='annotations/instances_val.json',
        data_prefix=dict(img='val/'),
        metainfo=dict(classes=CLASSES[1:]),
        pipeline=[LoadImageFromFile(), LoadAnnotations(with_bbox=True, with_mask=True)],
    )
    scene = draw_scene(np.random.default_rng([0, 1, 0]), SMALL['size'])
    sample = dataset[0]
    assert sample['gt_bboxes_labels'].tolist() == [i.label - 1 for i in scene.instances]
    masks = sample['gt_masks'].to_ndarray()
    np.testing.assert_array_equal(masks, np.stack([i.mask for i in scene.instances]))


# -------------------------------------------------------------------------------- command line


def command_line(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, 'argv', [SCRIPT.name, *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name='__main__')


def test_command_line_writes_both_formats_and_says_what_is_in_them(tmp_path, monkeypatch, capsys):
    counts = ('--train', 2, '--val', 1, '--size', 48)
    for layout in ('ade20k', 'coco'):
        command_line(monkeypatch, tmp_path / layout, '--format', layout, *counts)
        printed = capsys.readouterr().out
        assert f'Wrote {tmp_path / layout}' in printed
        assert all(name in printed for name in CLASSES)
    assert (tmp_path / 'ade20k/annotations/validation').is_dir()
    assert (tmp_path / 'coco/annotations/instances_val.json').is_file()
    command_line(monkeypatch, tmp_path / 'coco', '--format', 'coco', *counts)
    assert 'Nothing to do' in capsys.readouterr().out


def test_command_line_names_a_bad_argument_without_a_traceback(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match='size must be at least 32, not 8'):
        command_line(monkeypatch, tmp_path / 'shapes', '--size', 8)
