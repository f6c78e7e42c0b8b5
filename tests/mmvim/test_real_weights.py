"""The released DeiT-Ti names what is in real photographs, where weights and photographs are.

Neither comes with this project: docs/data.md says where they are from, and where they have to lie.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mmvim import DeiT
from mmvim.engine.checkpoint_hook import fit_checkpoint

ROOT = Path(__file__).parents[2]
WEIGHTS = Path(os.environ.get('MMVIM_DEIT_TINY', ROOT / 'data/deit_tiny_patch16_224.pth'))
IMAGENETTE = Path(os.environ.get('MMVIM_IMAGENETTE', ROOT / 'data/imagenette'))
# Folders of imagenette: their class of ImageNet's thousand.
CLASSES = {
    'n01440764': 0, 'n02102040': 217, 'n02979186': 482, 'n03000684': 491, 'n03028079': 497,
    'n03394916': 566, 'n03417042': 569, 'n03425413': 571, 'n03445777': 574, 'n03888257': 701,
}  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not WEIGHTS.is_file(), reason=f'no DeiT-Ti at {WEIGHTS}: docs/data.md'),
]


def read(path: Path) -> torch.Tensor:
    """The centre of 224 px of a picture of short side 256, (3, 224, 224), as DeiT is evaluated."""
    picture = Image.open(path).convert('RGB')
    scale = 256 / min(picture.size)
    picture = picture.resize([round(scale * side) for side in picture.size], Image.BICUBIC)
    left, top = ((side - 224) // 2 for side in picture.size)
    picture = picture.crop((left, top, left + 224, top + 224))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255  # (3, 224, 224)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    return (pixels - mean) / std


def pretrained() -> DeiT:
    init = dict(type='Pretrained', checkpoint=str(WEIGHTS))
    model = DeiT('tiny', out_type='cls_token', init_cfg=init)
    model.init_weights()
    return model.eval()


@pytest.mark.skipif(not IMAGENETTE.is_dir(), reason=f'no imagenette at {IMAGENETTE}: docs/data.md')
def test_released_weights_name_photographs():
    head = torch.load(WEIGHTS, weights_only=True)['model']
    model, right = pretrained(), []
    for folder, label in CLASSES.items():
        paths = sorted((IMAGENETTE / 'val' / folder).iterdir())
        for start in range(0, len(paths), 32):
            images = torch.stack([read(path) for path in paths[start : start + 32]])
            with torch.no_grad():
                (tokens,) = model(images)  # (B, 192)
            scores = tokens @ head['head.weight'].T + head['head.bias']  # (B, 1000)
            right += (scores.argmax(1) == label).tolist()
    print(f'\n1000-way top-1 on {len(right)} pictures: {100 * np.mean(right):.2f} %')
    # 0.1 % by chance; 72.2 % is published for all classes of ImageNet from larger originals.
    assert np.mean(right) > 0.5


def test_load_from_gives_what_init_cfg_gives():
    """A classifier by mmpretrain's names gets backbone and head from the official file."""
    backbone = DeiT('tiny', out_type='cls_token')
    head = nn.ModuleDict(dict(fc=nn.Linear(192, 1000)))
    model = nn.ModuleDict(dict(backbone=backbone, head=head)).eval()
    checkpoint = torch.load(WEIGHTS, weights_only=True)
    official = dict(checkpoint['model'])
    fit_checkpoint(model, checkpoint, str(WEIGHTS))
    model.load_state_dict(checkpoint['state_dict'])  # strict: nothing is left as it was
    assert torch.equal(head['fc'].weight, official['head.weight'])
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images), pretrained()(images), rtol=0, atol=0)
