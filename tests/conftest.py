"""Tests of classification need mmpretrain, which has an environment of its own; loading
checkpoints and making runners leave nothing behind."""

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec

import pytest

HERE = find_spec('mmpretrain') is not None
collect_ignore = [] if HERE else ['cls']


def pytest_terminal_summary(terminalreporter) -> None:
    if not HERE:
        terminalreporter.write_line('tests/cls needs mmpretrain: `make test-cls` runs it')


@pytest.fixture(autouse=True)
def scope_of_its_own():
    """A runner makes its scope the default of the whole process: tests start without one, and give
    back what there was."""
    if find_spec('mmengine') is None:  # the ops are tested by themselves, too
        yield
        return
    from mmengine.registry import DefaultScope

    before = dict(DefaultScope._instance_dict)
    DefaultScope._instance_dict.clear()
    yield
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(before)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def address(tmp_path, monkeypatch):
    """Address of a server for the files of ``tmp_path``; nothing stays in the user's cache."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()


@pytest.fixture
def guard(monkeypatch):
    """What the tools do first; undone afterwards."""
    from mmengine.runner import CheckpointLoader

    from mmvim.utils import checkpoint, guard_checkpoints

    monkeypatch.setattr(checkpoint, '_trusted', False)
    monkeypatch.setattr(CheckpointLoader, '_schemes', CheckpointLoader._schemes.copy())
    with monkeypatch.context() as environment:
        for name in (checkpoint.FORCE, checkpoint.FORCE_NOT):
            environment.setenv(name, '')  # so that it is put back
        yield guard_checkpoints
