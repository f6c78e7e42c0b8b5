import json

from command_line import passed, refused, tool

from mmvim.datasets.shapes import write_coco


def test_a_subset_has_the_images_their_objects_and_all_categories(tmp_path):
    write_coco(tmp_path / 'shapes', train=4, val=1, size=32)
    source, out = tmp_path / 'shapes/annotations/instances_train.json', tmp_path / 'few.json'
    passed(tool('dataset_tools/coco_subset.py', source, out, '--images', 4, 2))
    before, after = json.loads(source.read_text()), json.loads(out.read_text())
    assert [image['id'] for image in after['images']] == [2, 4]
    expected = [a for a in before['annotations'] if a['image_id'] in (2, 4)]
    assert after['annotations'] == expected != []
    assert after['categories'] == before['categories']


def test_images_that_are_not_annotated_are_named(tmp_path):
    write_coco(tmp_path / 'shapes', train=1, val=1, size=32)
    source, out = tmp_path / 'shapes/annotations/instances_train.json', tmp_path / 'few.json'
    message = refused(tool('dataset_tools/coco_subset.py', source, out, '--images', 1, 7))
    assert 'no such image: 7' in message and not out.exists()
    message = refused(
        tool('dataset_tools/coco_subset.py', tmp_path / 'no.json', out, '--images', 1)
    )
    assert 'no.json' in message
