"""The backbone equals the official code, from whose runs the golden data come."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from official_cases import GOLDEN, arguments, assert_near

from mmvim import VisionMamba


def load(case: dict, tmp_path: Path, **args) -> VisionMamba:
    """A model that has read the case's weights from a file in the official format."""
    torch.save({'model': case['state_dict']}, tmp_path / 'official.pth')
    pretrained = dict(type='Pretrained', checkpoint=str(tmp_path / 'official.pth'))
    model = VisionMamba(**arguments(case['kwargs']), **args, init_cfg=pretrained)
    model.init_weights()
    return model.eval()


@pytest.mark.parametrize('name', [n for n, c in GOLDEN.items() if c['kind'] == 'classifier'])
def test_classifier_features_and_gradients(name, tmp_path):
    case = GOLDEN[name]
    pooling = case['kwargs'].get('final_pool_type')
    out_type = {'mean': 'avg_featmap', 'max': 'raw'}.get(pooling, 'cls_token')
    model = load(case, tmp_path, out_type=out_type)
    image = case['input'].clone().requires_grad_()
    (features,) = model(image)
    logits = F.linear(features, *(case['state_dict'][f'head.{k}'] for k in ('weight', 'bias')))
    if pooling == 'max':
        logits = logits.amax(dim=1)
    logits.backward(case['grad_output'])

    assert_near(features, case['features'], 'features')
    assert_near(logits, case['logits'], 'logits')
    assert_near(image.grad, case['grad_input'], 'input gradient')
    parameters = dict(model.named_parameters())
    for key, grad in case['grads'].items():
        assert_near(parameters[key].grad, grad, f'gradient of {key}')


@pytest.mark.parametrize('name', [n for n, c in GOLDEN.items() if c['kind'] == 'dense'])
def test_dense_features(name, tmp_path):
    case = GOLDEN[name]
    official = case['kwargs']
    model = load(
        case,
        tmp_path,
        out_indices=official['out_indices'],
        feature_source='residual' if official.get('use_residual_as_feature') else 'mixer',
        final_norm=official.get('last_layer_process') == 'add & norm',
    )
    for index, (ours, features) in enumerate(
        zip(model(case['input']), case['features'], strict=True)
    ):
        assert_near(ours, features, f'out index {index}')
