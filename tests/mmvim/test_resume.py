"""``--resume`` takes the newest checkpoint that is whole, and says which it passes over."""

import os

import pytest
import torch
from tiny_training import equal, runner, weights

from mmvim.engine.resumable_runner import newest_first
from mmvim.utils import CheckpointError, load_from_local

KEEP = {'default_hooks.checkpoint.max_keep_ckpts': 3}


@pytest.fixture
def trained(tmp_path):
    runner(tmp_path, {'train_cfg.max_iters': 6, **KEEP}).train()
    assert sorted(path.name for path in tmp_path.glob('*.pth')) == [
        'iter_2.pth',
        'iter_4.pth',
        'iter_6.pth',
    ]
    return tmp_path


def resumed(work_dir, **settings):
    """The runner and its log after it has looked for a checkpoint."""
    made = runner(work_dir, {'resume': 'auto', **KEEP, **settings})
    made.load_or_resume()
    return made, max(work_dir.glob('*/*.log'), key=os.path.getmtime).read_text()


def cut(path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize('content', ['', '\0\0\0', 'iter_', '/gone/iter_9.pth', None])
def test_a_broken_last_checkpoint_does_not_matter(trained, content):
    if content is None:
        (trained / 'last_checkpoint').unlink()
    else:
        (trained / 'last_checkpoint').write_text(content)
    assert resumed(trained)[0].iter == 6


@pytest.mark.parametrize('size', [0, 1, 1000, -1])
def test_truncated_checkpoints_are_passed_over_and_named(trained, size):
    cut(trained / 'iter_6.pth', size)
    cut(trained / 'iter_4.pth', size)
    made, log = resumed(trained)
    assert made.iter == 2
    for name in ('iter_6.pth', 'iter_4.pth'):
        assert f'Resuming passes over {trained / name}: ' in log
    assert f'Resuming from {trained / "iter_2.pth"}' in log


def test_a_checkpoint_later_than_the_last_that_is_named_is_taken(trained):
    (trained / 'last_checkpoint').write_text(str(trained / 'iter_4.pth'))
    assert resumed(trained)[0].iter == 6


def test_weights_alone_are_passed_over(trained):
    state = load_from_local(str(trained / 'iter_6.pth'))
    torch.save({'state_dict': state['state_dict']}, trained / 'iter_6.pth')
    made, log = resumed(trained)
    assert made.iter == 4
    assert 'iter_6.pth: it has no message_hub and no meta' in log


def test_nothing_whole_is_an_error_that_names_all(trained):
    for name in ('iter_2.pth', 'iter_4.pth', 'iter_6.pth'):
        cut(trained / name, 100)
    with pytest.raises(CheckpointError, match=r'can be resumed from.*iter_6.*iter_4.*iter_2'):
        resumed(trained)


def test_nothing_to_resume_starts_from_load_from(trained, tmp_path):
    path = str(trained / 'iter_6.pth')
    made, log = resumed(tmp_path / 'new', load_from=path)
    assert made.iter == 0
    assert 'has no checkpoint to resume' in log
    assert equal(made.model.state_dict(), weights(trained, 'iter_6.pth'))


def test_a_moved_work_dir_is_resumed(trained, tmp_path):
    moved = tmp_path / 'moved'
    moved.mkdir()
    for path in trained.glob('*.pth'):
        path.rename(moved / path.name)
    (trained / 'last_checkpoint').rename(moved / 'last_checkpoint')
    assert resumed(moved)[0].iter == 6


def test_checkpoints_elsewhere_are_found(tmp_path):
    elsewhere = {'default_hooks.checkpoint.out_dir': str(tmp_path / 'elsewhere')}
    runner(tmp_path / 'run', {'train_cfg.max_iters': 4, **elsewhere}).train()
    assert (tmp_path / 'elsewhere/run/iter_4.pth').is_file()
    (tmp_path / 'run/last_checkpoint').write_text('')
    assert resumed(tmp_path / 'run', **elsewhere)[0].iter == 4


def test_the_seed_is_the_one_of_the_checkpoint(trained):
    seed = load_from_local(str(trained / 'iter_6.pth'))['meta']['seed']
    made, _ = resumed(trained)
    assert made.seed == seed
    assert made.train_dataloader.sampler.seed == seed  # the order of the data, too
    _, log = resumed(trained, randomness=dict(seed=seed + 1))
    assert f'goes on with seed {seed} of its checkpoint; the config has {seed + 1}' in log


def touch(path, seconds: float):
    path.write_bytes(b'')
    os.utime(path, (seconds, seconds))
    return path


def order(folder, last: str) -> list[str]:
    (folder / 'last_checkpoint').write_text(last and str(folder / last))
    files = newest_first(folder / 'last_checkpoint', folder, 'iter_{}.pth')
    return [path.stem for path in files]


def test_an_earlier_training_in_the_same_folder_is_older(tmp_path):
    for step, seconds in ((900, 100), (1000, 200), (50, 300), (100, 400)):
        touch(tmp_path / f'iter_{step}.pth', seconds)
    expected = ['iter_100', 'iter_50', 'iter_1000', 'iter_900']
    assert order(tmp_path, 'iter_100.pth') == expected
    assert order(tmp_path, 'iter_50.pth') == expected
    assert order(tmp_path, '') == expected


def test_copied_files_have_misleading_times(tmp_path):
    for step, seconds in ((100, 1), (1000, 2), (50, 3)):  # copied in the order of their names
        touch(tmp_path / f'iter_{step}.pth', seconds)
    assert order(tmp_path, 'iter_1000.pth')[0] == 'iter_1000'


def test_other_files_are_no_candidates(tmp_path):
    for name in ('best_mIoU_iter_3.pth', 'iter_3.pth.incomplete', 'iter_x.pth', 'epoch_3.pth'):
        touch(tmp_path / name, 1)
    touch(tmp_path / 'iter_3.pth', 1)
    assert order(tmp_path, '') == ['iter_3']
