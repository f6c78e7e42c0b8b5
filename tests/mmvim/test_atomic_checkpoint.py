"""A kill at any step of writing checkpoints leaves one to resume from."""

import os
from contextlib import nullcontext
from pathlib import Path

import pytest
from mmengine.fileio import get_file_backend
from tiny_training import runner

from mmvim.engine.atomic_checkpoint import AtomicCheckpointHook, write_atomically
from mmvim.engine.resumable_runner import newest_first
from mmvim.utils import load_from_local


class Killed(BaseException):
    """Nothing catches it and no clean-up follows, as with a kill."""


def kill_at(operation: int, folder: Path, monkeypatch) -> list[tuple[str, str]]:
    """End the process, so to speak, before its n-th operation on files of a folder; what it did
    is listed."""
    done = []

    def watched(name):
        original = getattr(os, name)

        def perform(what, *arguments, **settings):
            if isinstance(what, int) or str(what).startswith(str(folder)):
                if len(done) == operation:
                    raise Killed
                done.append((name, '' if isinstance(what, int) else Path(what).name))
            return original(what, *arguments, **settings)

        return perform

    for name in ('fsync', 'replace', 'remove'):
        monkeypatch.setattr(os, name, watched(name))
    return done


def whole(work_dir) -> list[str]:
    files = newest_first(work_dir / 'last_checkpoint', work_dir, 'iter_{}.pth')
    assert all(load_from_local(str(file))['meta']['iter'] for file in files)
    return [file.name for file in files]


@pytest.mark.parametrize('operation', range(8))
def test_a_checkpoint_survives_a_kill_between_any_two_steps(tmp_path, monkeypatch, operation):
    runner(tmp_path, {'train_cfg.max_iters': 2}).train()
    assert whole(tmp_path) == ['iter_2.pth']
    with monkeypatch.context() as patch:
        steps = kill_at(operation, tmp_path, patch)
        settings = {'train_cfg.max_iters': 4, 'resume': True}
        with pytest.raises(Killed) if operation < 7 else nullcontext():
            runner(tmp_path, settings).train()
        assert len(steps) == operation
    assert whole(tmp_path) in (['iter_2.pth'], ['iter_4.pth', 'iter_2.pth'], ['iter_4.pth'])
    runner(tmp_path, {'train_cfg.max_iters': 6, 'resume': True}).train()
    assert whole(tmp_path) == ['iter_6.pth']  # one, as max_keep_ckpts says
    assert not list(tmp_path.glob('*.incomplete'))


def test_the_steps_of_a_checkpoint(tmp_path, monkeypatch):
    runner(tmp_path, {'train_cfg.max_iters': 2}).train()
    steps = kill_at(100, tmp_path, monkeypatch)
    runner(tmp_path, {'train_cfg.max_iters': 4, 'resume': True}).train()
    assert steps == [
        ('fsync', ''),
        ('replace', 'iter_4.pth.incomplete'),
        ('fsync', ''),
        ('fsync', ''),
        ('replace', 'last_checkpoint.incomplete'),
        ('fsync', ''),
        ('remove', 'iter_2.pth'),
    ]


@pytest.fixture
def validated(tmp_path):
    """A function that reports a score at an iteration, in a training that keeps the best."""
    made = runner(tmp_path, {'default_hooks.checkpoint.save_best': 'mIoU'})
    hook = next(hook for hook in made.hooks if isinstance(hook, AtomicCheckpointHook))
    made.optim_wrapper = made.build_optim_wrapper(made.optim_wrapper)
    made.param_schedulers = made.build_param_scheduler(made.param_schedulers)
    hook.before_train(made)

    def validate(iteration: int, score: float) -> list[str]:
        made.train_loop._iter = iteration
        hook.after_val_epoch(made, dict(mIoU=score))
        return best(tmp_path)

    return validate


def best(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob('best*.pth'))


def test_one_best_checkpoint_is_kept(validated):
    assert validated(1, 1.0) == ['best_mIoU_iter_1.pth']
    assert validated(3, 2.0) == ['best_mIoU_iter_3.pth']
    assert validated(5, 1.5) == ['best_mIoU_iter_3.pth']
    assert validated(3, 4.0) == ['best_mIoU_iter_3.pth']  # the same name again


def test_the_best_checkpoint_is_there_until_the_next_one_is(tmp_path, validated, monkeypatch):
    validated(1, 1.0)
    kill_at(1, tmp_path, monkeypatch)  # the new file is written, and not yet renamed
    with pytest.raises(Killed):
        validated(3, 2.0)
    assert best(tmp_path) == ['best_mIoU_iter_1.pth']


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / 'file'
    write_atomically(b'old', path)

    def full(_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space left'):
        write_atomically(b'new', path)
    assert path.read_bytes() == b'old'
    assert [file.name for file in tmp_path.iterdir()] == ['file']


def test_the_plain_hook_of_a_config_becomes_the_atomic_one(tmp_path):
    hooks = [type(hook).__name__ for hook in runner(tmp_path).hooks]
    assert 'AtomicCheckpointHook' in hooks and 'CheckpointHook' not in hooks


@pytest.mark.parametrize(
    ('settings', 'backend'),
    [
        (dict(), 'AtomicLocalBackend'),
        (dict(out_dir='elsewhere'), 'AtomicLocalBackend'),
        (dict(backend_args=dict(backend='local')), 'LocalBackend'),
    ],
)
def test_local_files_are_written_atomically(settings, backend):
    hook = AtomicCheckpointHook(**settings)
    assert type(get_file_backend('x', backend_args=hook.backend_args)).__name__ == backend


def test_an_object_store_keeps_its_backend():
    assert AtomicCheckpointHook(out_dir='s3://bucket/runs').backend_args is None
