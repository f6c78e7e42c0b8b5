"""``tools/predict.py`` on folders of real files, called from a folder of the user's."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from command_line import passed, tool
from PIL import Image
from tiny_models import DETECTOR, SEGMENTOR, write_checkpoint, write_config

from mmvim.apis import load_model, predict, read_picture
from mmvim.datasets.shapes import CLASSES, PALETTE, draw_scene


def scene(height: int, width: int, seed: int) -> np.ndarray:
    return draw_scene(np.random.default_rng(seed), 96).image[:height, :width, ::-1].copy()


def rows(path: Path) -> list[dict]:
    return list(csv.DictReader(path.read_text(encoding='utf-8').splitlines()))


@pytest.fixture(scope='module')
def photos(tmp_path_factory) -> Path:
    """A folder as people have them, with things that are no pictures."""
    folder = tmp_path_factory.mktemp('home') / 'my photos'
    (folder / 'more').mkdir(parents=True)
    Image.fromarray(scene(64, 80, 0)).save(folder / 'one.jpg')
    Image.fromarray(scene(64, 80, 1)).save(folder / 'more' / 'one.PNG')
    Image.fromarray(scene(50, 60, 2)).save(folder / 'more' / 'two.png')
    Image.fromarray(scene(50, 60, 3)).convert('L').save(folder / 'more' / 'two.tif')
    deep = scene(64, 80, 4)[..., 0].astype(np.uint16) * 16
    Image.fromarray(deep).save(folder / 'deep.png')
    content = (folder / 'one.jpg').read_bytes()
    (folder / 'cut.jpg').write_bytes(content[: len(content) // 2])
    (folder / 'notes.txt').write_text('notes')
    (folder / '.hidden.jpg').write_bytes(content)
    return folder


@pytest.fixture(scope='module')
def segmentor(photos) -> tuple[Path, Path]:
    config = write_config(photos.parent / 'segmentor.py', SEGMENTOR)
    return config, write_checkpoint(photos.parent / 'segmentor.pth', config)


@pytest.fixture(scope='module')
def segmented(photos, segmentor) -> str:
    """What a call prints that is run in the user's folder, with paths relative to it."""
    names = [path.name for path in segmentor]
    return passed(tool('predict.py', *names, photos.name, '--device', 'cpu', cwd=photos.parent))


def test_each_picture_of_a_folder_gets_a_label_map(photos, segmentor, segmented):
    out = photos.parent / 'predictions'
    found = {str(path.relative_to(out)) for path in (out / 'labels').rglob('*.png')}
    names = ['one', 'deep', 'more/one', 'more/two.png', 'more/two.tif']
    assert found == {f'labels/{name}.png' for name in names}
    model = load_model(*segmentor, device='cpu')
    (sample,) = predict(model, photos / 'more' / 'one.PNG')
    with Image.open(out / 'labels' / 'more' / 'one.png') as image:
        assert image.mode == 'P'
        labels = np.array(image)
        np.testing.assert_array_equal(labels, sample.pred_sem_seg.data[0])
        colours = np.array(image.convert('RGB'))
    np.testing.assert_array_equal(colours, np.array(PALETTE, np.uint8)[labels])
    assert [row['class'] for row in rows(out / 'labels.csv')] == list(CLASSES)


def test_pictures_show_the_colours_over_the_photo(photos, segmented):
    out = photos.parent / 'predictions'
    drawn = read_picture(out / 'pictures' / 'more' / 'two.png.jpg')
    labels = read_picture(out / 'labels' / 'more' / 'two.png.png')
    photo = read_picture(photos / 'more' / 'two.png')
    assert drawn.shape == photo.shape
    difference = np.abs(drawn - (photo / 2 + labels / 2)).max(-1)
    assert np.median(difference) < 8  # names cover the rest


def test_what_is_skipped_is_listed_and_stops_nothing(photos, segmented):
    assert 'predicted 5 in' in segmented and 'skipped 2:' in segmented
    assert 'my photos/notes.txt: unknown type .txt' in segmented
    assert 'my photos/cut.jpg: broken' in segmented
    assert '1 of 5: 16-bit samples were read as 12-bit' in segmented
    skipped = rows(photos.parent / 'predictions' / 'skipped.csv')
    assert {Path(row['file']).name for row in skipped} == {'cut.jpg', 'notes.txt'}


def test_patterns_batches_and_a_folder_of_results(photos, segmentor, command, tmp_path):
    pattern = photos / '**' / 't*.*'
    options = ['--batch-size', 4, '--no-pictures', '--out-dir', tmp_path / 'to here']
    output = command(*segmentor, pattern, photos / 'one.jpg', *options)
    assert 'predicted 3 in' in output and 'skipped' not in output
    found = {path.name for path in (tmp_path / 'to here').rglob('*.*')}
    assert found == {'labels.csv', 'two.png.png', 'two.tif.png', 'one.png'}


def test_a_picture_that_the_model_fails_on_does_not_take_others_along(
    photos, segmentor, command, tmp_path
):
    Image.new('RGB', (5000, 1)).save(tmp_path / 'thin.png')
    # The network would get a picture of no height.
    text = Path(segmentor[0]).read_text() + (
        "test_dataloader = dict(dataset=dict(pipeline=[dict(type='LoadImageFromFile'), "
        "dict(type='Resize', scale=(64, 64), keep_ratio=True), dict(type='PackSegInputs')]))\n"
    )
    (tmp_path / 'config.py').write_text(text)
    pictures = [photos / 'one.jpg', tmp_path / 'thin.png', photos / 'deep.png']
    output = command('config.py', segmentor[1], *pictures, '--batch-size', 3)
    assert 'predicted 2 in' in output and 'skipped 1:' in output
    assert 'thin.png: cannot be predicted (' in output
    with Image.open(tmp_path / 'predictions' / 'labels' / 'one.png') as labels:
        assert labels.size == (80, 64)


def test_a_name_that_is_no_text_stops_nothing(photos, segmentor, command, tmp_path):
    folder = tmp_path / 'old archive'
    folder.mkdir()
    name, other = (os.fsdecode(name) for name in (b'caf\xe9.png', b'caf\xe9.txt'))  # Latin-1
    (folder / name).write_bytes((photos / 'more' / 'two.png').read_bytes())
    (folder / other).touch()
    output = command(*segmentor, folder)
    assert 'predicted 1 in' in output and 'caf\\udce9.txt: unknown type .txt' in output
    assert (tmp_path / 'predictions' / 'labels' / name).exists()
    listed = (tmp_path / 'predictions' / 'skipped.csv').read_bytes()
    assert os.fsencode(folder / other) in listed


def test_nothing_predicted_is_an_error(photos, segmentor, command, tmp_path, capsys):
    with pytest.raises(SystemExit, match='nothing was predicted: there is no picture'):
        command(*segmentor, photos / 'notes.txt', tmp_path / 'none')
    assert 'notes.txt: unknown type .txt' in capsys.readouterr().out
    (tmp_path / 'a.png').touch()
    with pytest.raises(SystemExit, match='no picture among the inputs outside of --out-dir .$'):
        command(*segmentor, '.', '--out-dir', '.')
    with pytest.raises(SystemExit, match='nothing was predicted: 1 skipped'):
        command(*segmentor, photos / 'cut.jpg')
    assert 'cut.jpg: broken, or no picture' in capsys.readouterr().out


def test_options_that_make_no_sense_are_refused(photos, segmentor, command, capsys):
    with pytest.raises(SystemExit, match='--score-thr is for detection'):
        command(*segmentor, photos, '--score-thr', 0.5)
    for options, message in (
        ('--depth 20', '--depth must be from 8 to 16, got 20'),
        ('--opacity 1.5', '--opacity must be from 0 to 1, got 1.5'),
        ('--batch-size 0', '--batch-size must be positive, got 0'),
        ('--windows 64', '--windows must be positive and needs --raster, got 64'),
        ('--raster --windows 0', '--windows must be positive and needs --raster, got 0'),
        ('--raster --batch-size 2', 'leave --batch-size out, or give --windows'),
        ('--raster --overlap 8', '--overlap needs --windows, got 8'),
        ('--raster --windows 8 --overlap 8', 'from 0 to less than --windows, got 8'),
        ('--raster --windows 8 --tile 8', '--windows is the other way'),
    ):
        with pytest.raises(SystemExit):
            command(*segmentor, photos, *options.split())
        assert message in capsys.readouterr().err


def test_detections_are_a_coco_data_set(photos, command, tmp_path):
    from pycocotools.coco import COCO

    config = write_config(tmp_path / 'detector.py', DETECTOR)
    checkpoint = write_checkpoint(tmp_path / 'detector.pth', config)
    pictures = [photos / 'one.jpg', photos / 'more' / 'two.png']
    options = ['--score-thr', 0.1, '--device', 'cpu']
    output = command(config, checkpoint, *pictures, *options)
    assert 'predicted 2 in' in output
    coco = COCO(tmp_path / 'predictions' / 'detections.json')
    assert [image['file_name'] for image in coco.imgs.values()] == [str(p) for p in pictures]
    model = load_model(config, checkpoint, 'cpu')
    for (image_id, image), path in zip(coco.imgs.items(), pictures, strict=True):
        (sample,) = predict(model, path)
        kept = sample.pred_instances[sample.pred_instances.scores >= 0.1]
        annotations = coco.imgToAnns[image_id]
        assert len(annotations) == len(kept) > 0
        assert (image['height'], image['width']) == sample.ori_shape
        for k, annotation in enumerate(annotations):
            left, top, width, height = annotation['bbox']
            corners = [left, top, left + width, top + height]
            np.testing.assert_allclose(corners, kept.bboxes[k], rtol=1e-4, atol=1e-3)
            np.testing.assert_array_equal(coco.annToMask(annotation), kept.masks[k])
            name = coco.cats[annotation['category_id']]['name']
            assert name == model.dataset_meta['classes'][kept.labels[k]]
            assert annotation['score'] == pytest.approx(float(kept.scores[k]))
    drawn = read_picture(tmp_path / 'predictions' / 'pictures' / 'one.jpg')
    assert drawn.shape == read_picture(pictures[0]).shape
