"""Checkpoints that a kill at any moment leaves whole."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS

__all__ = ['AtomicCheckpointHook', 'AtomicLocalBackend', 'write_atomically']

BACKEND = 'atomic_local'
UNFINISHED = '.incomplete'


def write_atomically(content: bytes, path: str | Path) -> None:
    """Write a file so that ``path`` holds all of the old content or all of the new, never a part.

    The content goes to ``<path>.incomplete`` in the same folder, onto the disk, and is renamed.

    Raises:
        OSError: The content could not be written; what was at ``path`` is still there.
    """
    path = Path(path)
    unfinished = Path(f'{path}{UNFINISHED}')
    try:
        with open(unfinished, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    if os.name == 'posix':  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name survives a power failure, too
        finally:
            os.close(folder)


class AtomicLocalBackend(LocalBackend):
    """mmengine's backend for local files, with atomic writing.

    Settings that take ``backend_args`` select it by ``dict(backend='atomic_local')``.
    """

    def put(self, obj: bytes, filepath: str | Path) -> None:
        Path(filepath).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(obj, filepath)


register_backend(BACKEND, AtomicLocalBackend, force=True)


class _LateRemoval:
    """A file backend whose removals wait for :meth:`remove_now`."""

    def __init__(self, backend) -> None:
        self.backend = backend
        self.waiting = []

    def __getattr__(self, name: str):
        return getattr(self.backend, name)

    def remove(self, path: str) -> None:
        self.waiting.append((self.backend.remove, path))

    def rmtree(self, path: str) -> None:
        self.waiting.append((self.backend.rmtree, path))

    def remove_now(self, spared: set[str]) -> None:
        for remove, path in self.waiting:
            if path not in spared:
                remove(path)


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook`` in an order of steps that survives a kill.

    mmengine removes the outdated checkpoint before it writes the new one, and writes under the
    final name; a kill in between leaves nothing with ``max_keep_ckpts=1``, or half a file. Here a
    file is written under a temporary name, renamed when it is complete, named in
    ``last_checkpoint``, and only then are outdated files removed. For that time the disk holds one
    checkpoint more than ``max_keep_ckpts``. Temporary files that a kill left are removed when
    training starts.

    Arguments are those of mmengine's hook. Files that are not local (``out_dir`` with ``://``, or
    ``backend_args``) are written as their backend does it.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        chosen = self.backend_args is not None or self.file_client_args is not None
        if not chosen and '://' not in str(self.out_dir or ''):
            self.backend_args = dict(backend=BACKEND)

    def before_train(self, runner) -> None:
        super().before_train(runner)
        if not is_main_process() or '://' in str(self.out_dir):
            return
        for folder in {Path(self.out_dir), Path(runner.work_dir)}:
            for path in folder.glob(f'*{UNFINISHED}'):
                path.unlink()
                runner.logger.info(f'{path} is removed: writing it was cut short.')

    def _save_checkpoint_with_step(self, runner, step: int, meta: dict) -> None:
        kept = [step]
        if self.max_keep_ckpts > 0:
            kept = [*(s for s in self.keep_ckpt_ids if s != step), step]
            # Names the outdated step, too: where a kill prevents its removal, the resumed
            # training removes it.
            runner.message_hub.update_info('keep_ckpt_ids', kept)
            self.keep_ckpt_ids = deque(kept, self.max_keep_ckpts)
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if not is_main_process():
            return
        write_atomically(self.last_ckpt.encode(), Path(runner.work_dir, 'last_checkpoint'))
        for outdated in kept[: -self.max_keep_ckpts] if self.max_keep_ckpts > 0 else []:
            path = self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(outdated))
            if self.file_backend.isfile(path):
                self.file_backend.remove(path)
            elif self.file_backend.isdir(path):  # a checkpoint in shards
                self.file_backend.rmtree(path)

    def _save_best_checkpoint(self, runner, metrics: dict) -> None:
        backend = self.file_backend
        self.file_backend = late = _LateRemoval(backend)
        try:
            super()._save_best_checkpoint(runner, metrics)
        finally:
            self.file_backend = backend
        best = getattr(self, 'best_ckpt_path_dict', {}).values()
        late.remove_now(spared={getattr(self, 'best_ckpt_path', None), *best})
