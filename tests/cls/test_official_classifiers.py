"""Official classifiers, head included, give their own logits in mmpretrain."""

from pathlib import Path

import pytest
import torch
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmpretrain.registry import MODELS
from official_cases import GOLDEN, arguments, assert_near

import mmvim.models.max_pool_head  # noqa: F401  (registers it)

CLASSIFIERS = [name for name, case in GOLDEN.items() if case['kind'] == 'classifier']


def classifier(case: dict, num_classes: int) -> dict:
    backbone = dict(type='VisionMamba', **arguments(case['kwargs']))
    pooling = case['kwargs'].get('final_pool_type')
    out_types = {'mean': 'avg_featmap', 'max': 'raw'}
    backbone['out_type'] = (
        'cls_token' if backbone['cls_token'] else out_types.get(pooling, 'cls_token')
    )
    return dict(
        type='ImageClassifier',
        backbone=backbone,
        head=dict(
            type='MaxPoolClsHead' if backbone['out_type'] == 'raw' else 'LinearClsHead',
            num_classes=num_classes,
            in_channels=case['kwargs']['embed_dim'],
        ),
    )


def load(cfg: dict, checkpoint: Path) -> torch.nn.Module:
    runner = Runner(
        cfg,
        str(checkpoint.parent),
        load_from=str(checkpoint),
        custom_hooks=[dict(type='FitCheckpointHook')],
        default_scope='mmpretrain',
        experiment_name=checkpoint.parent.name,
    )
    runner.load_or_resume()
    return runner.model.eval()


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_logits(name, tmp_path):
    case = GOLDEN[name]
    torch.save({'model': case['state_dict']}, tmp_path / 'official.pth')
    model = load(classifier(case, len(case['state_dict']['head.bias'])), tmp_path / 'official.pth')
    with torch.no_grad():
        logits = model(case['input'], mode='tensor')
    assert_near(logits, case['logits'], 'logits')


def test_a_head_of_other_classes_is_left_as_it_is(tmp_path):
    case = GOLDEN[CLASSIFIERS[0]]
    torch.save({'model': case['state_dict']}, tmp_path / 'official.pth')
    init_default_scope('mmpretrain')
    untrained = MODELS.build(classifier(case, 3)).head.fc.weight.shape
    model = load(classifier(case, 3), tmp_path / 'official.pth')
    assert model.head.fc.weight.shape == untrained
    weight = case['state_dict']['patch_embed.proj.weight']
    assert torch.equal(model.backbone.patch_embed.proj.weight, weight)
