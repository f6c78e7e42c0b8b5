"""What is measured: a model, a part of it or all, and one step of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope
from mmengine.utils import import_modules_from_strings
from torch import Tensor, nn

from ..datasets.samples import generate_batch

__all__ = ['DTYPES', 'MODEL_NAMES', 'PARTS', 'Step', 'Subject']

CONFIGS = Path(__file__).parents[1] / '.mim' / 'configs'
# What each part's whole model is read from: {family} is vim or deit, {name} such as vim-tiny.
WHOLE = {
    'segmentor': '{family}/{name}_upernet_8xb2-160k_ade20k-512x512.py',
    'detector': '{family}/{name}_cascade-mask-rcnn{attention}_8xb8-380k_coco-1024x1024.py',
}
PARTS = ('backbone', 'pyramid', *WHOLE)
ARCHS = ('tiny', 'small', 'base')
MODEL_NAMES = tuple(
    [f'vim-{arch}{recompute}' for arch in ARCHS for recompute in ('', '-all')]
    + [f'deit-{arch}-{attention}' for arch in ARCHS for attention in ('fused', 'explicit')]
)
TYPES = {'vim': 'VisionMamba', 'deit': 'DeiT'}
VARIANT = {'vim': 'recompute', 'deit': 'attention'}  # what the third part of a name sets
DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
FLOPS: dict[tuple[str, str, int], int] = {}  # counted so far by model, part and size


@dataclass(frozen=True)
class Subject:
    """One row of a benchmark.

    Args:
        model (str): One of ``MODEL_NAMES``; ``fused`` and ``explicit`` are DeiT's attention,
            ``all`` is Vim with ``recompute='all'``.
        part (str): ``'backbone'``; ``'pyramid'``: with SimpleFeaturePyramid; ``'segmentor'``:
            UperNet; ``'detector'``: Cascade Mask R-CNN.
        size (int): Side of the images.
        mode (str): ``'forward'`` without gradients, or ``'train'``: forward, loss and backward.
        batch_size (int): Images.
        device (str): ``'cpu'`` or ``'cuda'``.
        dtype (str): ``'fp32'``, or ``'bf16'`` or ``'fp16'`` by autocast.
        run (str): ``'eager'``, ``'compile'`` (torch.compile) or ``'graph'`` (a CUDA graph of the
            whole step; of a backbone or a pyramid).
        isa (str): Instruction set that a CPU is held to, a key of
            ``instruction_sets.ENVIRONMENTS``; ``''``: the best of everything.
    """

    model: str
    part: str
    size: int
    mode: str = 'forward'
    batch_size: int = 1
    device: str = 'cpu'
    dtype: str = 'fp32'
    run: str = 'eager'
    isa: str = ''

    @property
    def setting(self) -> str:
        """What a table is headed with: only rows of the same setting are compared."""
        return f'{self.mode}, {self.dtype}, {self.run}'


def build_backbone(name: str, size: int) -> nn.Module:
    """A backbone as for dense prediction: no class token, the map of the last block."""
    family, arch, *variant = name.split('-')
    cfg = dict(type=TYPES[family], arch=arch, img_size=size, cls_token=None)
    if variant:
        cfg[VARIANT[family]] = variant[0]
    return MODELS.build(cfg)


def build_whole(name: str, part: str, size: int) -> tuple[nn.Module, str]:
    """The model of a config, for images of this size, and the scope it belongs to."""
    family, arch, *variant = name.split('-')
    attention = '-global' if family == 'deit' else ''
    path = CONFIGS / WHOLE[part].format(family=family, name=f'{family}-{arch}', attention=attention)
    if not path.exists():
        raise ValueError(f'there is no config for the {part} of {name}: {path.name}')
    cfg = Config.fromfile(path)
    import_modules_from_strings(**cfg.custom_imports)
    init_default_scope(cfg.default_scope)
    if variant:
        cfg.model.backbone[VARIANT[family]] = variant[0]
    if part == 'detector':
        cfg.model.data_preprocessor.pop('batch_augments', None)  # pads to the config's size
    else:
        cfg.model.data_preprocessor.size = (size, size)
    return MODELS.build(cfg.model), cfg.default_scope


class Step:
    """A subject made ready: calling it runs one step to its end on the device."""

    def __init__(self, subject: Subject) -> None:
        MMLogger.get_current_instance().setLevel('WARNING')  # how each layer is initialised
        init_default_scope('mmengine')
        torch.manual_seed(0)
        self.subject = subject
        if subject.part in WHOLE:
            self.model, scope = build_whole(subject.model, subject.part, subject.size)
            self.backbone = self.model.backbone
            batch = generate_batch(scope, subject.batch_size, subject.size)
        else:
            self.model = self.backbone = build_backbone(subject.model, subject.size)
            batch = torch.randn(subject.batch_size, 3, subject.size, subject.size)
        if subject.part == 'pyramid':
            pyramid = MODELS.build(
                dict(
                    type='SimpleFeaturePyramid',
                    in_channels=self.backbone.embed_dims,
                    out_channels=256,
                    norm_cfg=dict(type='LN2d'),
                    num_outs=5,
                )
            )
            self.model = nn.Sequential(self.backbone, pyramid)
        training = subject.mode == 'train'
        self.model = self.model.to(subject.device).train(training)
        self.batch = batch if isinstance(batch, dict) else batch.to(subject.device)
        self.forward: Callable = self.model
        if subject.run == 'compile':
            self.forward = torch.compile(self.model)
        self.graph = None

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def tokens(self) -> int:
        """Length of the sequence of one image."""
        rows, columns = self.backbone.patch_embed.grid(self.subject.size, self.subject.size)
        return rows * columns + len(self.backbone.cls_token_names)

    def __call__(self) -> None:
        if self.subject.run == 'graph':
            self._replay()
        else:
            self._work()
        if self.subject.device == 'cuda':
            torch.cuda.synchronize()

    def _work(self) -> None:
        if self.subject.mode == 'train':
            self._train()
        else:
            with torch.inference_mode():
                self._predict()

    def _autocast(self):
        dtype = DTYPES[self.subject.dtype]
        if dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.subject.device, dtype)

    def _predict(self):
        with self._autocast():
            if not isinstance(self.batch, dict):
                return self.forward(self.batch)
            batch = self.model.data_preprocessor(copy.deepcopy(self.batch), False)
            return self.forward(**batch, mode='predict')

    def _train(self) -> None:
        self.model.zero_grad(set_to_none=True)
        with self._autocast():
            if isinstance(self.batch, dict):
                batch = self.model.data_preprocessor(copy.deepcopy(self.batch), True)
                loss, _ = self.model.parse_losses(self.forward(**batch, mode='loss'))
            else:
                loss = sum(feature.float().square().mean() for feature in self.forward(self.batch))
        loss.backward()

    def _replay(self) -> None:
        if self.graph is None:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self._work()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._work()  # gradients are set to None in it, so replays do not add to them
            self.graph = graph
            torch.cuda.empty_cache()  # the graph has memory of its own, and others share the GPU
        self.graph.replay()

    def count_flops(self) -> int | None:
        """FLOPs of a forward pass of one image, counted on shapes alone; None for whole models.

        What a detector computes depends on what it finds: ``get_flops.py`` counts whole models.
        """
        from ..utils.flops import count_flops

        if self.subject.part in WHOLE:
            return None
        size = self.subject.size
        key = (self.subject.model, self.subject.part, size)
        if key not in FLOPS:  # it takes longer than most steps, and is the same in every setting
            model = copy.deepcopy(self.model).eval().to('meta')
            image: Tensor = torch.empty(1, 3, size, size, device='meta')
            with torch.no_grad():
                FLOPS[key] = count_flops(lambda: model(image))
        return FLOPS[key]
