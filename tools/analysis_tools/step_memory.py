"""Peak memory and time of one step of any config: ``step_memory.py CONFIG``.

Takes the config's model and optimizer and a generated picture of shapes; no data set is needed. The
peak is that of a process of its own, less what it held just before the first step (model and
picture). On the CPU it is what the kernel reports as resident (VmHWM - VmRSS, Linux), on a GPU what
torch allocated there.
"""

import argparse
import ctypes
import gc
import platform
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData
from mmengine.utils import import_modules_from_strings

from mmvim.datasets.shapes import Scene, draw_scene

MIB = 2**20


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file of mmseg or mmdet')
    parser.add_argument(
        '--mode',
        choices=['train', 'test'],
        default='train',
        help='train: forward, backward and optimizer; test: predictions (default: %(default)s)',
    )
    parser.add_argument('--size', type=int, default=1024, help='image side (default: %(default)s)')
    parser.add_argument('--batch-size', type=int, default=1, help='images (default: %(default)s)')
    parser.add_argument(
        '--steps', type=int, default=2, help='the last is timed (default: %(default)s)'
    )
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE')
    args = parser.parse_args()
    for name in ('size', 'batch_size', 'steps'):
        if getattr(args, name) < 1:
            parser.error(f'--{name.replace("_", "-")} must be positive')
    return args


def resize(image: np.ndarray, size: int) -> np.ndarray:
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_NEAREST)


def detection_sample(scene: Scene, size: int):
    from mmdet.structures import DetDataSample
    from mmdet.structures.bbox import HorizontalBoxes
    from mmdet.structures.mask import BitmapMasks

    masks = [resize(instance.mask.astype(np.uint8), size) for instance in scene.instances]
    masks = BitmapMasks(masks, size, size)
    truth = InstanceData(
        bboxes=HorizontalBoxes.from_instance_masks(masks).tensor,
        labels=torch.tensor([instance.label - 1 for instance in scene.instances]),
        masks=masks,
    )
    nothing = InstanceData(bboxes=torch.empty(0, 4), labels=torch.empty(0, dtype=torch.long))
    return DetDataSample(gt_instances=truth, ignored_instances=nothing)


def segmentation_sample(scene: Scene, size: int):
    from mmseg.structures import SegDataSample

    labels = resize(scene.semantic - np.uint8(1), size).astype(np.int64)  # unlabelled: 0 → 255
    return SegDataSample(gt_sem_seg=PixelData(data=torch.from_numpy(labels)[None]))


def generate(scope: str, batch_size: int, size: int) -> dict:
    """What a data loader of this scope gives for generated pictures."""
    make = {'mmdet': detection_sample, 'mmseg': segmentation_sample}[scope]
    inputs, samples = [], []
    for seed in range(batch_size):
        scene = draw_scene(np.random.default_rng(seed), size=128)
        sample = make(scene, size)
        shape = dict(img_shape=(size, size), ori_shape=(size, size), pad_shape=(size, size))
        sample.set_metainfo(dict(shape, img_id=seed, scale_factor=(1.0, 1.0)))
        image = resize(scene.image, size).transpose(2, 0, 1)  # (3, H, W)
        inputs.append(torch.from_numpy(np.ascontiguousarray(image)))
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


class PeakMemory:
    """Bytes in use on a device, and the most since :meth:`reset`."""

    def __init__(self, device: str) -> None:
        self.device = device

    def reset(self) -> int:
        """Start anew; returns what is in use now."""
        gc.collect()
        if self.device == 'cuda':
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back to the kernel
        Path('/proc/self/clear_refs').write_text('5')  # VmHWM := VmRSS
        return self._status('VmRSS')

    def peak(self) -> int:
        if self.device == 'cuda':
            return torch.cuda.max_memory_allocated()
        return self._status('VmHWM')

    @staticmethod
    def _status(key: str) -> int:
        lines = Path('/proc/self/status').read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def processor(device: str) -> str:
    if device == 'cuda':
        return torch.cuda.get_device_name()
    lines = Path('/proc/cpuinfo').read_text().splitlines()
    name = next((line.split(': ')[1] for line in lines if line.startswith('model name')), 'CPU')
    return f'{name}, {torch.get_num_threads()} threads'


def main() -> None:
    args = parse_args()
    cfg = Config.fromfile(args.config)
    cfg.merge_from_dict(args.cfg_options or {})
    if cfg.default_scope not in ('mmdet', 'mmseg'):
        raise SystemExit(f'step_memory: no pictures for default_scope={cfg.default_scope!r}')
    import_modules_from_strings(**cfg.custom_imports)
    init_default_scope(cfg.default_scope)
    MMLogger.get_current_instance().setLevel('WARNING')  # how each layer is initialised
    torch.manual_seed(0)
    device, training = get_device(), args.mode == 'train'
    if cfg.default_scope == 'mmseg':
        cfg.model.data_preprocessor.size = (args.size, args.size)
    elif training:
        pads = cfg.model.data_preprocessor.get('batch_augments') or []
        for pad in (pad for pad in pads if pad.type == 'BatchFixedSizePad'):
            pad.size = (args.size, args.size)
    model = MODELS.build(cfg.model).to(device).train(training)
    model.init_weights()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper) if training else None
    batch = generate(cfg.default_scope, args.batch_size, args.size)

    memory = PeakMemory(device)
    before = memory.reset()
    for _ in range(args.steps):
        start = time.perf_counter()
        if training:
            log = model.train_step(batch, wrapper)
        else:
            with torch.no_grad():
                model.test_step(batch)
        if device == 'cuda':
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f'{Path(args.config).stem} {args.cfg_options or ""}\n'
        f'{args.mode} step, {args.batch_size} x {args.size} x {args.size}: '
        f'peak {(memory.peak() - before) / MIB:.0f} MiB above {before / MIB:.0f} MiB, '
        f'{seconds:.2f} s, {parameters / 1e6:.1f} M parameters\n'
        f'{processor(device)}; torch {torch.__version__}, Python {platform.python_version()}'
    )
    if training:
        print(*(f'{key} {torch.as_tensor(value).item():.3f}' for key, value in log.items()))


if __name__ == '__main__':
    main()
