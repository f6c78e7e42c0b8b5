"""A training that was killed and resumed ends as one that was not."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS, RUNNERS
from mmengine.runner import BaseLoop, CheckpointLoader, Runner

from mmvim.utils import CheckpointError
from mmvim.utils.launch import UserError
from mmvim.utils.processes import end_with_launcher

from .atomic_checkpoint import AtomicCheckpointHook
from .cpu_runner import CpuDistributedRunner, join_processes
from .reproducible import SeedIterationHook, seed_samples

__all__ = ['ResumableRunner', 'build_runner', 'newest_first']


def build_runner(cfg: Config) -> Runner:
    """The runner that ``runner_type`` of a config names, otherwise a :class:`ResumableRunner`.

    Raises:
        mmvim.utils.launch.UserError: As :func:`~mmvim.engine.cpu_runner.join_processes`; or the
            config shards the model and clips gradients.
    """
    if 'runner_type' not in cfg:
        return ResumableRunner.from_cfg(cfg)
    sharded = 'FSDP' in str((cfg.get('strategy') or {}).get('type'))
    if sharded and (cfg.get('optim_wrapper') or {}).get('clip_grad'):
        raise UserError(
            'optim_wrapper.clip_grad with FSDPStrategy: mmengine would clip every shard by its own '
            'norm, not by that of all gradients. Set optim_wrapper.clip_grad=None.'
        )
    if cfg.get('launcher', 'none') != 'none':
        join_processes(cfg.launcher, (cfg.get('env_cfg') or {}).get('dist_cfg') or {})
    return RUNNERS.build(cfg)


@RUNNERS.register_module()
class ResumableRunner(CpuDistributedRunner):
    """Trains so that a kill at any moment costs no more than the time since the last checkpoint.

    - Checkpoints are written by :class:`AtomicCheckpointHook`, also where the config says
      ``CheckpointHook``.
    - Resuming takes the newest checkpoint that can be loaded; the log says which ones it passes
      over and why.
    - Random numbers depend on the run's seed and the position in the training
      (:mod:`mmvim.engine.reproducible`), and the seed is taken from the checkpoint before data are
      loaded. On a CPU the resumed training ends bit-equal to an undisturbed one.
    - Workers of torchrun end with it, so that none writes beside the resumed training.

    This project's tools use it for every config that has no ``runner_type``; elsewhere
    ``runner_type='ResumableRunner'`` selects it.

    Args:
        resume (bool | str): True and no ``load_from``, or ``'auto'``: from the newest checkpoint
            in the work dir; where there is none, training starts as without ``resume``. True and
            ``load_from``: from that checkpoint.
        **kwargs: As mmengine's ``Runner``.

    Raises:
        mmvim.utils.CheckpointError: There are checkpoints in the work dir, none can be resumed
            from.
    """

    _searched = False

    def setup_env(self, env_cfg: dict) -> None:
        end_with_launcher()
        super().setup_env(env_cfg)

    def register_hook(self, hook: Hook | dict, priority=None) -> None:
        if isinstance(hook, dict):
            kind = hook.get('type')
            if (HOOKS.get(kind) if isinstance(kind, str) else kind) is CheckpointHook:
                hook = dict(hook, type=AtomicCheckpointHook)
        super().register_hook(hook, priority)

    def register_hooks(self, default_hooks=None, custom_hooks=None) -> None:
        super().register_hooks(default_hooks, custom_hooks)
        self.register_hook(SeedIterationHook())

    def build_train_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        self._find_checkpoint()
        if not isinstance(loop, BaseLoop):
            self._train_dataloader = seed_samples(self._train_dataloader, self.seed)
        return super().build_train_loop(loop)

    def load_or_resume(self) -> None:
        self._find_checkpoint()
        super().load_or_resume()

    def _find_checkpoint(self) -> None:
        """Decide what to resume from and take over its seed, in all processes alike."""
        if self._searched or not self._resume:
            return
        self._searched = True
        found = [self._load_from, None, None]  # path, seed, error
        if is_main_process():
            try:
                found[:2] = self._newest_whole() if self._resumes_newest else self._named()
            except CheckpointError as error:
                found[2] = str(error)
        broadcast_object_list(found)
        path, seed, error = found
        if error is not None:
            raise CheckpointError(error)
        if path is None:
            self._resume = False
            self.logger.info(f'{self.work_dir} has no checkpoint to resume; training starts.')
            return
        self._resume, self._load_from = True, path
        self._take_seed(seed)

    @property
    def _resumes_newest(self) -> bool:
        return self._resume == 'auto' or self._load_from is None

    def _named(self) -> tuple[str, int | None]:
        checkpoint = CheckpointLoader.load_checkpoint(self._load_from, map_location='cpu')
        meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
        return self._load_from, (meta or {}).get('seed')

    def _newest_whole(self) -> tuple[str | None, int | None]:
        """The newest checkpoint of the work dir that can be resumed from, and its seed."""
        passed = []
        for path in self._candidates():
            try:
                checkpoint = CheckpointLoader.load_checkpoint(str(path), map_location='cpu')
                absent = {'meta', 'state_dict', 'message_hub'} - set(checkpoint)
                if absent:
                    raise CheckpointError(f'it has no {" and no ".join(sorted(absent))}')
            except Exception as error:
                # Whatever it is: the runner, which loads in the same way, would fail on it.
                reason = str(error).strip() or type(error).__name__
                passed.append(f'{path}: {reason.splitlines()[0]}')
                self.logger.warning(f'Resuming passes over {passed[-1]}')
                continue
            self.logger.info(f'Resuming from {path}, the newest checkpoint that is whole.')
            return str(path), checkpoint['meta'].get('seed')
        if passed:
            raise CheckpointError(
                f'no checkpoint in {self.work_dir} can be resumed from ({"; ".join(passed)}). '
                'To train from the start, remove them or leave out --resume.'
            )
        return None, None

    def _candidates(self) -> list[Path]:
        folder, template = self.work_dir, 'epoch_{}.pth'
        for hook in self.hooks:
            if isinstance(hook, CheckpointHook):
                template = hook.filename_tmpl
                if hook.out_dir is not None:
                    folder = os.path.join(hook.out_dir, os.path.basename(self.work_dir))
        return newest_first(Path(self.work_dir, 'last_checkpoint'), Path(folder), template)

    def _take_seed(self, seed: int | None) -> None:
        """Set the seed before data are loaded; mmengine sets it after their order is fixed."""
        configured = self._randomness_cfg.get('seed')
        if seed is None or seed == configured:
            return
        if configured is not None:
            self.logger.warning(
                f'The training goes on with seed {seed} of its checkpoint; the config has '
                f'{configured}.'
            )
        self._randomness_cfg.update(seed=seed)
        self.set_randomness(**self._randomness_cfg)


def newest_first(last_checkpoint: Path, folder: Path, template: str) -> list[Path]:
    """Checkpoints of a training, the newest first.

    What ``last_checkpoint`` names is the newest, unless a later step was written after it: a kill
    may come between the two. Times alone would mislead where a folder was copied, steps alone
    where an earlier training used the same folder.

    Args:
        last_checkpoint (Path): File with the name of the last checkpoint; may be empty or absent.
        folder (Path): Where the checkpoints are.
        template (str): Their names, such as ``'iter_{}.pth'``.
    """
    pattern = re.compile('([0-9]+)'.join(map(re.escape, template.split('{}'))))
    steps = {path: pattern.fullmatch(path.name) for path in folder.glob('*') if path.is_file()}
    steps = {path: int(match[1]) for path, match in steps.items() if match}

    def age(path: Path) -> tuple[float, int]:
        return path.stat().st_mtime, steps.get(path, -1)

    newest = sorted(steps, key=age, reverse=True)
    try:
        # After the folder was moved, the file is beside last_checkpoint.
        name = last_checkpoint.read_text(errors='replace').strip('\0 \n')
        named = next(p for p in (Path(name), folder / Path(name).name) if name and p.is_file())
    except (OSError, ValueError, StopIteration):
        return newest
    later = [
        p for p in newest if p.stat().st_mtime >= age(named)[0] and steps[p] > steps.get(named, -1)
    ]
    first = [*sorted(later, key=steps.get, reverse=True), named]
    return [*first, *(path for path in newest if path not in first)]
