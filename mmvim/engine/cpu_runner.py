"""Several processes on a machine without an accelerator."""

from __future__ import annotations

import os
from datetime import timedelta

from mmengine.device import get_device
from mmengine.dist import is_distributed
from mmengine.model import is_model_wrapper, revert_sync_batchnorm
from mmengine.registry import MODEL_WRAPPERS, RUNNERS
from mmengine.runner import Runner
from torch import distributed, nn
from torch.nn.modules.batchnorm import SyncBatchNorm
from torch.nn.parallel import DistributedDataParallel

from mmvim.utils.launch import UserError

__all__ = ['CpuDistributedRunner', 'join_processes']


def join_processes(launcher: str, dist_cfg: dict) -> None:
    """Join the processes of a distributed run over gloo where there is no accelerator.

    With an accelerator nothing is done: the runner joins them as OpenMMLab does.

    Args:
        launcher (str): ``'pytorch'``, ``'slurm'`` or ``'mpi'``.
        dist_cfg (dict): ``env_cfg.dist_cfg`` of the config; its ``timeout`` (seconds) is kept.

    Raises:
        mmvim.utils.launch.UserError: The launcher set no ``RANK``, or it is not ``'pytorch'`` and
            there is no accelerator.
    """
    if is_distributed():
        return
    if launcher == 'pytorch' and 'RANK' not in os.environ:
        raise UserError(
            '--launcher pytorch joins processes that torchrun started, and RANK is not set. Start '
            'them with tools/dist_train.sh, tools/dist_test.sh or torchrun.'
        )
    if get_device() != 'cpu':
        return
    if launcher != 'pytorch':
        raise UserError(
            f'--launcher {launcher} needs a GPU. Without one, start the processes with torchrun '
            'and pass --launcher pytorch.'
        )
    seconds = dist_cfg.get('timeout')
    timeout = None if seconds is None else timedelta(seconds=seconds)
    distributed.init_process_group('gloo', timeout=timeout)


@RUNNERS.register_module()
class CpuDistributedRunner(Runner):
    """mmengine's ``Runner``, which without an accelerator runs several processes over gloo.

    mmengine selects a CUDA device before it joins the processes, hands it to
    ``DistributedDataParallel``, and leaves synchronised batch norm, which torch has for
    accelerators only. With an accelerator, and in a single process, this runner is mmengine's.

    Raises:
        mmvim.utils.launch.UserError: As :func:`join_processes`.
    """

    def setup_env(self, env_cfg: dict) -> None:
        if self.distributed:
            join_processes(self.launcher, env_cfg.get('dist_cfg') or {})
        super().setup_env(env_cfg)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        if not self.distributed or get_device() != 'cpu' or is_model_wrapper(model):
            return super().wrap_model(model_wrapper_cfg, model)
        if self.cfg.get('sync_bn') or any(isinstance(m, SyncBatchNorm) for m in model.modules()):
            self.logger.warning(
                'Without a GPU, batch norm is not synchronised: each process normalises with the '
                'statistics of its own images.'
            )
        wrapper = model_wrapper_cfg or dict(
            broadcast_buffers=False,
            find_unused_parameters=self.cfg.get('find_unused_parameters', False),
        )
        wrapper = {'type': 'MMDistributedDataParallel', **wrapper}
        kind = wrapper['type']
        kind = MODEL_WRAPPERS.get(kind) if isinstance(kind, str) else kind
        defaults = dict(module=revert_sync_batchnorm(model))
        if issubclass(kind, DistributedDataParallel):
            defaults['device_ids'] = None
        return MODEL_WRAPPERS.build(wrapper, default_args=defaults)
