"""Configs of the OpenMMLab packages find this project's parts by their bare names."""

import subprocess
import sys

import pytest

SCRIPT = """
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.utils import import_modules_from_strings

cfg = Config(dict(
    default_scope='{scope}', custom_imports=dict(imports=['mmvim']),
    backbone=dict(type='VisionMamba', arch=dict(embed_dims=16, depth=2)),
    baseline=dict(type='DeiT', arch=dict(embed_dims=16, depth=2, num_heads=2)),
    neck=dict(type='SimpleFeaturePyramid', in_channels=16)))
import_modules_from_strings(**cfg.custom_imports)
init_default_scope(cfg.default_scope)
from {scope}.registry import MODELS
print(*(type(MODELS.build(cfg[key])).__name__ for key in ('backbone', 'baseline', 'neck')))
"""


@pytest.mark.parametrize('scope', ['mmseg', 'mmdet'])
def test_found_without_a_prefix(scope):
    # A process of its own: registries are global.
    result = subprocess.run(
        [sys.executable, '-c', SCRIPT.format(scope=scope)], capture_output=True, text=True
    )
    expected = ['VisionMamba', 'DeiT', 'SimpleFeaturePyramid']
    assert result.stdout.split()[-3:] == expected, result.stderr
