"""No file runs code, whatever is in it and by whichever way it comes in."""

import os
import pickle
import tarfile
from argparse import Namespace
from pathlib import Path

import hostile
import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader, Runner

from mmvim import VisionMamba
from mmvim.utils import CheckpointError, load_from_local

PAYLOADS = list(hostile.payloads(Path('trace')))
# One that is refused for the name of a function, one for what it does with an admitted name.
TYPICAL = ['reduce_eval', 'getattr_chain']


@pytest.fixture(params=['zip', 'legacy', 'bare'])
def form(request) -> str:
    return request.param


def write(tmp_path: Path, payload: str, form: str = 'zip') -> tuple[Path, Path]:
    """A hostile file, and the file that is there if its code has run."""
    trace = tmp_path / 'trace'
    pickled = hostile.checkpoint(hostile.payloads(trace)[payload])
    return hostile.write(tmp_path / f'{payload}.pth', pickled, form), trace


@pytest.mark.parametrize('payload', PAYLOADS)
def test_files_are_refused_and_the_type_is_named(payload, form, tmp_path):
    path, trace = write(tmp_path, payload, form)
    named = r'it refers to \w[\w.]+.*--trust-checkpoint.*guard_checkpoints\(trust=True\)'
    with pytest.raises(CheckpointError, match=f'{payload}.pth was refused.*{named}'):
        load_from_local(str(path))
    assert not trace.exists()


@pytest.mark.parametrize('form', ['zip', 'legacy'])
@pytest.mark.parametrize('payload', PAYLOADS)
def test_torch_refuses_them_after_importing_this_package(payload, form, tmp_path):
    path, trace = write(tmp_path, payload, form)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    assert not trace.exists()


@pytest.mark.parametrize('payload', TYPICAL)
@pytest.mark.parametrize('way', ['path', 'url'])
def test_init_cfg_refuses_them_without_a_guard(payload, way, form, tmp_path, address):
    path, trace = write(tmp_path, payload, form)
    source = str(path) if way == 'path' else f'{address}/{path.name}'
    model = VisionMamba(
        dict(embed_dims=16, depth=2), init_cfg=dict(type='Pretrained', checkpoint=source)
    )
    with pytest.raises(CheckpointError, match='was refused'):
        model.init_weights()
    assert not trace.exists()


@pytest.mark.parametrize('payload', TYPICAL)
@pytest.mark.parametrize('resume', [False, True])
@pytest.mark.parametrize('way', ['path', 'url'])
def test_runners_refuse_them_under_the_guard(payload, resume, way, tmp_path, address, guard):
    path, trace = write(tmp_path, payload)
    source = str(path) if way == 'path' else f'{address}/{path.name}'
    guard()
    runner = Runner(
        dict(type='VisionMamba', arch=dict(embed_dims=16, depth=2)),
        str(tmp_path),
        load_from=source,
        resume=resume,
        experiment_name=tmp_path.name,
    )
    with pytest.raises(CheckpointError, match='was refused'):
        runner.load_or_resume()
    assert not trace.exists()


@pytest.mark.parametrize('payload', TYPICAL)
def test_init_cfg_refuses_what_other_loaders_of_mmengine_fetch(
    payload, tmp_path, guard, monkeypatch
):
    """Some of them, as that of object stores on older torch, ask for full unpickling."""
    path, trace = write(tmp_path, payload)
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')  # not for init_cfg

    def load_from_store(filename, map_location):
        return torch.load(path, map_location, weights_only=False)

    CheckpointLoader.register_scheme('store://', load_from_store)
    init_cfg = dict(type='Pretrained', checkpoint='store://file.pth')
    model = VisionMamba(dict(embed_dims=16, depth=2), init_cfg=init_cfg)
    with pytest.raises(CheckpointError, match='store://file.pth was refused.*--trust-checkpoint'):
        model.init_weights()
    assert not trace.exists()
    assert os.environ['TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'] == '1'


@pytest.mark.parametrize('way', ['path', 'url'])
def test_trust_lets_init_cfg_and_runners_run_them(way, tmp_path, address, guard):
    """Otherwise the tests above might pass for another reason."""
    trace = tmp_path / 'trace'
    weights = VisionMamba(dict(embed_dims=16, depth=2)).state_dict()
    torch.save({'model': weights, 'x': hostile.Touch(trace)}, tmp_path / 'trusted.pth')
    source = str(tmp_path / 'trusted.pth') if way == 'path' else f'{address}/trusted.pth'
    guard(trust=True)
    model = VisionMamba(
        dict(embed_dims=16, depth=2), init_cfg=dict(type='Pretrained', checkpoint=source)
    )
    model.init_weights()
    assert trace.exists() and torch.equal(model.cls_token, weights['cls_token'])
    trace.unlink()
    CheckpointLoader.load_checkpoint(source, 'cpu')
    assert trace.exists()
    trace.unlink()
    guard(trust=False)
    with pytest.raises(CheckpointError, match='was refused'):
        CheckpointLoader.load_checkpoint(source, 'cpu')
    assert not trace.exists()


def test_pickles_of_newer_protocols_are_refused_with_their_types(tmp_path):
    path = tmp_path / 'protocol4.pth'
    torch.save({'x': hostile.Touch(tmp_path / 'trace')}, path, pickle_protocol=4)
    with pytest.raises(CheckpointError, match='was refused.*refers to posix.system'):
        load_from_local(str(path))
    path.write_bytes(pickle.dumps({'x': hostile.Touch(tmp_path / 'trace')}))
    with pytest.raises(CheckpointError, match='was refused.*refers to posix.system'):
        load_from_local(str(path))
    assert not (tmp_path / 'trace').exists()


def test_torchscript_and_tar_archives_never_reach_torch(tmp_path, monkeypatch):
    """torch before 2.6 handed both to readers that run code, in spite of weights_only."""
    monkeypatch.setattr(torch, 'load', lambda *args, **kwargs: pytest.fail('reached torch'))
    torch.jit.script(torch.nn.Linear(1, 1)).save(str(tmp_path / 'script.pth'))
    with tarfile.open(tmp_path / 'tar.pth', 'w') as archive:
        archive.add(tmp_path / 'script.pth', 'storages')
    for name, form in (('script', 'TorchScript'), ('tar', 'tar')):
        with pytest.raises(CheckpointError, match=f'{name}.pth was refused.*a {form} archive'):
            load_from_local(str(tmp_path / f'{name}.pth'))


def test_nothing_that_python_or_a_library_defines_is_admitted():
    admitted = [x for x in torch.serialization.get_safe_globals() if 'torch' not in x.__module__]
    assert {getattr, slice, HistoryBuffer, np.ndarray, np.dtype, Namespace}.isdisjoint(admitted)
    for reader in admitted:
        function = reader.__setstate__ if isinstance(reader, type) else reader
        assert function.__globals__['__name__'] == 'mmvim.utils.inert', reader
