"""A training of seconds for tests: random augmentation, dropout, a small Vision Mamba.

Configs import this module by name; :func:`config` writes one that the command line tools take.
"""

import copy
import itertools
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS
from torch import nn
from torch.utils.data import Dataset

from mmvim.engine import ResumableRunner
from mmvim.models import VisionMamba
from mmvim.utils import load_from_local

ROOT = Path(__file__).parents[2]
CONFIG = """
default_scope = 'mmengine'
custom_imports = dict(imports=['mmvim', 'tiny_training'])
model = dict(type='TinyModel')
train_dataloader = dict(
    batch_size=4, num_workers=0, dataset=dict(type='TinyDataset'),
    sampler=dict(type='InfiniteSampler', shuffle=True))
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1e-2), clip_grad=dict(max_norm=1.0))
param_scheduler = [dict(type='PolyLR', by_epoch=False, begin=0, end=12)]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=12)
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=1),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2, max_keep_ckpts=1))
log_processor = dict(by_epoch=False)
"""


@DATASETS.register_module()
class TinyDataset(Dataset):
    """Noise pictures; every generator that augmentations use is used.

    Args:
        classes (tuple): Names of the classes.
    """

    def __init__(self, classes: tuple[str, ...] = ('a', 'b')) -> None:
        self.pictures = torch.randn(21, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        self.metainfo = dict(classes=classes)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict:
        shift = random.random() + np.random.rand() + torch.rand(()).item()
        return dict(inputs=self.pictures[index] + shift, target=torch.tensor(index % 2))


@MODELS.register_module()
class TinyModel(BaseModel):
    """A backbone of two blocks and a linear layer.

    Args:
        drop_path_rate (float): Of the backbone.
        norm (str): ``'none'`` or ``'sync'``: batch norm between the two.
        ballast (int): Further entries of the checkpoint, to make writing it take time.
        seconds (float): What a step takes at least.
    """

    def __init__(
        self,
        drop_path_rate: float = 0.5,
        norm: str = 'none',
        ballast: int = 0,
        seconds: float = 0.0,
    ) -> None:
        super().__init__()
        self.seconds = seconds
        self.backbone = VisionMamba(
            dict(embed_dims=8, depth=2, d_state=4),
            img_size=16,
            patch_size=8,
            drop_path_rate=drop_path_rate,
            out_type='avg_featmap',
            cls_token=None,
        )
        norms = dict(none=nn.Identity, sync=lambda: nn.SyncBatchNorm(8))
        self.norm = norms[norm]()
        self.head = nn.Linear(8, 2)
        self.register_buffer('ballast', torch.zeros(ballast))

    def forward(self, inputs, target, mode='tensor'):
        inputs = torch.stack(inputs) if isinstance(inputs, (list, tuple)) else inputs
        target = torch.stack(target) if isinstance(target, (list, tuple)) else target
        time.sleep(self.seconds)
        scores = self.head(self.norm(self.backbone(inputs)[0]))
        if mode == 'loss':
            return dict(loss=nn.functional.cross_entropy(scores, target))
        return scores.argmax(1) if mode == 'predict' else scores


RUNS = itertools.count()


def runner(work_dir: Path, options: dict | None = None) -> ResumableRunner:
    """A runner in this process; ``options`` are settings of the config by dotted names."""
    cfg = Config.fromstring(CONFIG, '.py')
    # mmengine shares logs and counters between runners of one name.
    name = f'tiny_{next(RUNS)}'
    cfg.merge_from_dict(dict(work_dir=str(work_dir), experiment_name=name))
    cfg.merge_from_dict(copy.deepcopy(options or {}))
    return ResumableRunner.from_cfg(cfg)


def config(folder: Path, name: str = 'tiny.py', more: str = '') -> Path:
    """The config as a file; ``more`` is added at its end."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(CONFIG + more)
    return path


def environment() -> dict:
    paths = [str(Path(__file__).parent), str(ROOT), str(ROOT / 'ops')]
    paths += filter(None, [os.environ.get('PYTHONPATH')])
    return dict(
        os.environ,
        PYTHON=sys.executable,
        PYTHONPATH=os.pathsep.join(paths),
        OMP_NUM_THREADS='1',
        CUDA_VISIBLE_DEVICES='',
    )


def command(config: Path, work_dir: Path, *arguments, processes: int = 1) -> list[str]:
    """The command line that trains, in one process or through ``dist_train.sh``."""
    script = [sys.executable, ROOT / 'tools/train.py', config]
    if processes > 1:
        script = ['bash', ROOT / 'tools/dist_train.sh', config, processes]
    return [*map(str, [*script, '--work-dir', work_dir, *arguments])]


def train(config: Path, work_dir: Path, *arguments, processes: int = 1) -> str:
    """Train to the end; what it printed."""
    result = subprocess.run(
        command(config, work_dir, *arguments, processes=processes),
        env={**environment(), 'PORT': str(free_port())},
        capture_output=True,
        text=True,
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-4000:]
    return output


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


def weights(work_dir: Path, name: str = 'iter_12.pth') -> dict[str, torch.Tensor]:
    return load_from_local(str(work_dir / name))['state_dict']


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
