"""OpenMMLab's packages under other names, and mmcv without its compiled ops."""

import sys
from pathlib import Path

import mmengine.config.config as mmengine_config
import pytest
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.utils.dl_utils import mmcv_full_available

from mmvim.utils import openmmlab

CONFIG = Path(__file__).parents[2] / 'configs/vim/vim-demo_upernet_shapes-128x128.py'


def without(monkeypatch, missing):
    """Make the module think that ``missing`` cannot be imported."""
    is_there = openmmlab._is_there
    monkeypatch.setattr(openmmlab, '_is_there', lambda name: name != missing and is_there(name))


@pytest.mark.parametrize('missing', [None, 'pkg_resources'])
def test_configs_inherit_whatever_the_distribution_is_called(missing, monkeypatch):
    for name in ('is_installed', 'get_installed_path'):  # given back after the test
        monkeypatch.setattr(mmengine_config, name, getattr(mmengine_config, name))
    monkeypatch.setitem(MODULE2PACKAGE, 'mmseg', 'a-name-that-is-not-installed')
    with pytest.raises((ModuleNotFoundError, ImportError)):
        Config.fromfile(CONFIG)

    without(monkeypatch, missing)
    openmmlab.find_configs_by_import_name()
    assert Config.fromfile(CONFIG).default_scope == 'mmseg'


def test_mmengine_is_told_of_installed_packages_only(monkeypatch):
    without(monkeypatch, 'mmdet')
    monkeypatch.setitem(MODULE2PACKAGE, 'mmdet', 'the-name-to-install')
    openmmlab.find_configs_by_import_name()
    assert MODULE2PACKAGE['mmdet'] == 'the-name-to-install'


def test_ops_that_are_not_compiled_import_and_raise_when_called(monkeypatch):
    monkeypatch.setitem(sys.modules, 'mmcv._ext', None)  # given back after the test
    without(monkeypatch, 'mmcv._ext')
    openmmlab.stand_in_for_mmcv_ops()
    from mmcv.utils import ext_loader

    ops = ext_loader.load_ext('_ext', ['nms', 'roi_align_forward'])
    with pytest.raises(RuntimeError, match='without its compiled ops, and nms is one of them'):
        ops.nms()
    assert not mmcv_full_available()
