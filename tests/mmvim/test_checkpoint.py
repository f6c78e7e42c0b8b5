import pickle
import threading
from argparse import Namespace
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MessageHub

import mmvim  # noqa: F401  (lets torch read the message hub)
from mmvim.utils import CheckpointError, load_checkpoint, load_from_local


def test_truncated_files_are_told_from_hostile_ones(tmp_path):
    whole, cut = tmp_path / 'whole.pth', tmp_path / 'cut.pth'
    torch.save({'state_dict': {'w': torch.rand(1000)}}, whole)
    for size in (0, 1, 100, whole.stat().st_size // 2, whole.stat().st_size - 10):
        cut.write_bytes(whole.read_bytes()[:size])
        with pytest.raises(CheckpointError, match='cut.pth cannot be read.*cut short'):
            load_from_local(str(cut))
    cut.write_text('<html>404 Not Found</html>')
    with pytest.raises(CheckpointError, match='cut.pth cannot be read'):
        load_from_local(str(cut))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match='nothing.pth: there is no such file'):
        load_from_local(str(tmp_path / 'nothing.pth'))


def check_history(loaded: HistoryBuffer, log: list, counts: list) -> None:
    assert type(loaded) is HistoryBuffer
    assert [type(array) for array in loaded.data] == [np.ndarray] * 2
    assert loaded.data[0].tolist() == log and loaded.data[1].tolist() == counts
    loaded.update(5.0, 2)
    assert loaded.current() == 5 and loaded.statistics('max') == max(*log, 5)


LOADERS = [load_from_local, partial(torch.load, weights_only=True)]


@pytest.mark.parametrize('load', LOADERS, ids=['ours', 'torch'])
@pytest.mark.parametrize('new_format', [True, False], ids=['zip', 'legacy'])
def test_message_hubs_are_read_whole(tmp_path, load, new_format):
    hub = MessageHub('source')
    for value in (1.0, 2.5):
        hub.update_scalar('train/loss', value, 2)
    hub.update_info('best_score', np.float32(5.25))
    hub.update_info('palette', np.array([[1, 2, 3], [4, 5, 6]], 'uint8', order='F'))
    path = str(tmp_path / 'own.pth')
    torch.save({'message_hub': hub.state_dict()}, path, _use_new_zipfile_serialization=new_format)
    other = MessageHub('target')
    other.load_state_dict(load(path)['message_hub'])
    check_history(other.get_scalar('train/loss'), [1.0, 2.5], [2, 2])
    assert other.get_info('best_score') == 5.25
    assert np.array_equal(other.get_info('palette'), hub.get_info('palette'))
    assert other.state_dict()['resumed_keys'] == hub.state_dict()['resumed_keys']


KINDS = [*'?bBhHiIlLefdgFDG', '<U3', '>U3', 'S4', '>f8', '>i2', '<u4']


@pytest.mark.parametrize('load', LOADERS, ids=['ours', 'torch'])
@pytest.mark.parametrize('kind', KINDS)
def test_numbers_of_numpy_come_back_as_they_were(tmp_path, load, kind):
    array = np.arange(6).reshape(2, 3).astype(kind)
    path = str(tmp_path / 'numbers.pth')
    content = {'c': array, 'fortran': np.asfortranarray(array), 'empty': array[:0]}
    torch.save({**content, 'scalar': array[1, 1]}, path)
    loaded = load(path)
    for name, value in content.items():
        assert isinstance(loaded[name], np.ndarray)
        assert loaded[name].dtype == value.dtype.newbyteorder('=')  # numpy swaps when it reads
        assert np.array_equal(loaded[name], value) and loaded[name].shape == value.shape
    assert loaded['scalar'] == array[1, 1] and type(loaded['scalar']) is type(array[1, 1])
    # Written again, nothing of the reading shows.
    torch.save(loaded, path)
    assert b'mmvim' not in Path(path).read_bytes()
    assert type(pickle.loads(pickle.dumps(loaded['c']))) is np.ndarray


def test_files_of_numpy_1_are_read(tmp_path):
    path = tmp_path / 'numpy1.pth'
    torch.save(
        {'x': np.arange(3.0), 'y': np.float64(2)}, path, _use_new_zipfile_serialization=False
    )
    content = path.read_bytes()
    assert content.count(b'cnumpy._core.multiarray') == 2
    path.write_bytes(content.replace(b'cnumpy._core.multiarray', b'cnumpy.core.multiarray'))
    loaded = load_from_local(str(path))
    assert loaded['x'].tolist() == [0, 1, 2] and loaded['y'] == 2


def test_the_official_training_script_s_arguments_are_read_as_data(tmp_path):
    arguments = Namespace(model='vim_tiny', lr=5e-4, nested=Namespace(eps=[1, 2]), clip=None)
    torch.save({'model': {}, 'args': arguments, 'epoch': 3}, tmp_path / 'official.pth')
    loaded = load_from_local(str(tmp_path / 'official.pth'))
    assert type(loaded['args']) is Namespace and loaded['args'] == arguments


def test_the_type_in_the_way_is_named(tmp_path):
    torch.save({'origin': Path('x'), 'model': {}}, tmp_path / 'with_path.pth')
    with pytest.raises(CheckpointError, match='with_path.pth was refused: .*pathlib.PosixPath'):
        load_from_local(str(tmp_path / 'with_path.pth'))


def test_short_downloads_are_told_and_not_kept(tmp_path, monkeypatch):
    class Cut(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header('Content-Length', '1000')
            self.end_headers()
            self.wfile.write(b'x' * 100)

        def log_message(self, *args):
            pass

    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    with HTTPServer(('127.0.0.1', 0), Cut) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        url = f'http://127.0.0.1:{server.server_port}/weights.pth'
        with pytest.raises(CheckpointError, match='weights.pth: .*ended after 100 of 1000 bytes'):
            load_checkpoint(url)
    with pytest.raises(CheckpointError, match='weights.pth cannot be downloaded: .*refused'):
        load_checkpoint(url)
    assert list((tmp_path / 'hub/checkpoints').iterdir()) == []
