"""What makes OpenMMLab's packages of different origin work alike; importing mmvim applies it.

They come from OpenMMLab or, with the same import names, from the maintained forks (onedl-*); mmcv
comes with and without its compiled ops.
"""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import mmengine.config.config
from mmengine.config.utils import MODULE2PACKAGE

__all__ = ['find_configs_by_import_name', 'stand_in_for_mmcv_ops']


def find_configs_by_import_name() -> None:
    """Let ``_base_ = 'mmseg::…'`` find the configs of whatever distribution mmseg comes from.

    mmengine asks for a distribution by the name in its table, which the forks do not have. A name
    that is no distribution's it imports instead. It asks pkg_resources, which setuptools 81
    removed; without that, importing is the only way left.
    """
    for name in ('mmseg', 'mmdet', 'mmpretrain', 'mmvim'):
        if _is_there(name):
            MODULE2PACKAGE[name] = name
    if not _is_there('pkg_resources'):
        mmengine.config.config.is_installed = _is_there
        mmengine.config.config.get_installed_path = _folder


def _is_there(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _folder(name: str) -> str:
    return str(Path(importlib.util.find_spec(name).origin).parent)


class _MissingOps(ModuleType):
    """Has every op by name; calling one raises."""

    def __getattr__(self, name: str):
        if name.startswith('__'):
            raise AttributeError(name)

        def missing(*args, **kwargs):
            raise RuntimeError(
                f'mmcv was installed without its compiled ops, and {name} is one of them; '
                'docs/install.md of mmvim says how to install it with them'
            )

        return missing


def stand_in_for_mmcv_ops() -> None:
    """Let ``import mmcv.ops`` work without the compiled ops; an op raises when it is called.

    mmsegmentation 1.2.2 imports mmcv.ops whether or not the model has an op.
    """
    name = 'mmcv._ext'
    if _is_there('mmcv') and not _is_there(name):
        module = _MissingOps(name)
        module.__spec__ = ModuleSpec(name, None)  # no loader: mmengine takes it as not there
        sys.modules[name] = module
