"""Which pictures files, folders and patterns mean, and what their results are called."""

import errno
import os
from pathlib import Path

import pytest

from mmvim.apis.inputs import find_pictures


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    for name in (
        'trip/b.jpg',
        'trip/a.jpg',
        'trip/day 2/a.jpg',
        'trip/day 2/c.PNG',
        'trip/day 2/notes.txt',
        'trip/.cache/a.jpg',
        'trip/.a.jpg',
        'work/a.jpg',
        'x[1].jpg',
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(*inputs, out_dir='out') -> dict[str, str]:
    sources, _ = find_pictures(list(map(str, inputs)), Path(out_dir))
    return {str(source.path): str(source.name) for source in sources}


def test_a_folder_is_searched_with_all_below_it(home):
    expected = {'trip/a.jpg': 'a', 'trip/b.jpg': 'b'}
    expected |= {'trip/day 2/a.jpg': 'day 2/a', 'trip/day 2/c.PNG': 'day 2/c'}
    assert found('trip') == expected
    assert list(found('trip')) == list(expected)
    absolute = found(home / 'trip')
    assert list(absolute.values()) == list(expected.values())


def test_other_types_and_missing_files_are_listed(home):
    _, skipped = find_pictures(['trip', 'nowhere', 'no*.jpg'], Path('out'))
    assert {str(path): reason for path, reason in skipped} == {
        'trip/day 2/notes.txt': 'unknown type .txt',
        'nowhere': 'there is no such file or folder',
        'no*.jpg': 'there is no such file or folder',
    }


def test_linked_folders_are_searched_but_not_round_and_round(home):
    (home / 'trip/friends').symlink_to(home / 'work')
    (home / 'work/again').symlink_to(home / 'trip')
    (home / 'trip/a-link').symlink_to(home / 'trip/day 2')
    names = found('trip')
    assert names['trip/friends/a.jpg'] == 'friends/a'
    assert names['trip/day 2/a.jpg'] == 'day 2/a'  # not as the link calls it
    assert len(names) == 5


def test_what_cannot_be_opened_is_listed(home, monkeypatch):
    os.mkfifo(home / 'trip/pipe.jpg')
    (home / 'trip/gone.jpg').symlink_to('nowhere')
    (home / 'trip/loop.jpg').symlink_to('loop.jpg')
    scandir = os.scandir

    def locked(path):
        if Path(path).name == 'day 2':
            raise PermissionError(errno.EACCES, 'Permission denied', str(path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', locked)
    sources, skipped = find_pictures(['trip'], Path('out'))
    assert [source.path.name for source in sources] == ['a.jpg', 'b.jpg']
    assert {path.name: reason for path, reason in skipped} == {
        'pipe.jpg': 'it is no file',
        'gone.jpg': 'it is no file',
        'loop.jpg': 'it is no file',
        'day 2': 'Permission denied',
    }
    _, skipped = find_pictures(['trip/g*.jpg'], Path('out'))
    assert skipped == [(Path('trip/gone.jpg'), 'it is no file')]


def test_patterns_keep_the_folders_that_they_leave_open(home):
    assert found('trip/**/a.jpg') == {'trip/a.jpg': 'a', 'trip/day 2/a.jpg': 'day 2/a'}
    assert found('*/a.jpg') == {'trip/a.jpg': 'trip/a', 'work/a.jpg': 'work/a'}
    assert found('t*/day*') == {
        'trip/day 2/a.jpg': 'trip/day 2/a',
        'trip/day 2/c.PNG': 'trip/day 2/c',
    }


def test_a_name_that_looks_like_a_pattern_is_a_name(home):
    assert found('x[1].jpg') == {'x[1].jpg': 'x[1]'}


def test_a_picture_is_predicted_once(home):
    assert len(found('trip', 'trip/a.jpg', 'trip/*.jpg', home / 'trip')) == 4


def test_results_of_an_earlier_call_are_no_inputs(home):
    (home / 'trip/out').mkdir()
    (home / 'trip/out/a.jpg').touch()
    assert 'trip/out/a.jpg' not in found('trip', out_dir='trip/out')
    assert 'trip/out/a.jpg' in found('trip', out_dir='elsewhere')
    _, skipped = find_pictures(['trip/out/a.jpg'], Path('trip/out'))
    assert skipped == [(Path('trip/out/a.jpg'), 'it lies in the folder for results')]


def test_results_do_not_overwrite_each_other(home):
    (home / 'trip/a.png').touch()
    (home / 'trip/B.jpeg').touch()
    names = found('trip')
    assert names['trip/a.jpg'] == 'a.jpg' and names['trip/a.png'] == 'a.png'
    assert names['trip/b.jpg'] == 'b.jpg' and names['trip/B.jpeg'] == 'B.jpeg'
    assert names['trip/day 2/c.PNG'] == 'day 2/c'
    assert found('trip/b.jpg', 'trip/day 2', 'work') == {
        'trip/b.jpg': 'b',
        'trip/day 2/a.jpg': 'trip/day 2/a.jpg',
        'trip/day 2/c.PNG': 'c',
        'work/a.jpg': 'work/a.jpg',
    }
