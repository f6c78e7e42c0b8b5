"""Weights by name from the Hugging Face Hub: its client against a server on this machine."""

import hashlib
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import hostile
import pytest
import torch

from mmvim import VisionMamba
from mmvim.utils import CheckpointError, load_checkpoint

ARCH = dict(embed_dims=16, depth=2)
# The client reads its environment when it is imported.
READ = """
import sys
from mmengine.runner import CheckpointLoader
from mmvim import VisionMamba
from mmvim.utils import CheckpointError
for address in sys.argv[1:]:
    init_cfg = dict(type='Pretrained', checkpoint=address)
    model = VisionMamba(dict(embed_dims=16, depth=2), init_cfg=init_cfg)
    try:
        model.init_weights()
        CheckpointLoader.load_checkpoint(address, 'cpu')  # load_from
        print('SUM', model.cls_token.double().sum().item())
    except CheckpointError as error:
        print('ERROR', error)
"""


@pytest.fixture
def hub(tmp_path):
    """The client's environment for a hub that serves ``OWNER/REPO/resolve/main/FILE``."""
    folder, asked = tmp_path / 'hub', []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append((self.command, self.path))
            path = folder / self.path.lstrip('/').replace('resolve/main/', '')
            if not path.is_file():
                self.send_response(404)
                self.send_header('X-Error-Code', 'EntryNotFound')
                self.end_headers()
                return
            content = path.read_bytes()
            self.send_response(200)
            self.send_header('Content-Length', str(len(content)))
            self.send_header('ETag', f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header('X-Repo-Commit', '0' * 40)
            self.end_headers()
            if self.command == 'GET':
                self.wfile.write(content)

        do_GET = do_HEAD

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(('HF_', 'HUGGING'))
    }
    environment['HF_HOME'] = str(tmp_path / 'cache')
    environment['HF_ENDPOINT'] = f'http://127.0.0.1:{server.server_port}'
    yield folder, environment, asked
    server.shutdown()
    server.server_close()


def read(environment: dict, *names: str) -> list[str]:
    """What a process says of loading each of the hub's files."""
    command = [sys.executable, '-c', READ, *(f'hf://{name}' for name in names)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [line for line in result.stdout.splitlines() if line.startswith(('SUM', 'ERROR'))]


def test_weights_only_are_fetched_once_and_found_offline(hub, tmp_path):
    folder, environment, asked = hub
    weights, trace = VisionMamba(ARCH).state_dict(), tmp_path / 'trace'
    (folder / 'hustvl/Vim').mkdir(parents=True)
    torch.save({'model': weights}, folder / 'hustvl/Vim/vim.pth')
    payload = hostile.payloads(trace)['getattr_chain']
    hostile.write(folder / 'hustvl/Vim/bad.pth', hostile.checkpoint(payload), 'zip')

    good, bad, nothing = (f'hustvl/Vim/{name}.pth' for name in ('vim', 'bad', 'nothing'))
    said, refused, missing = read(environment, good, bad, nothing)
    expected = f'SUM {weights["cls_token"].double().sum().item()}'
    assert said == expected
    assert refused.startswith(f'ERROR checkpoint hf://{bad} (downloaded to')
    assert 'was refused: it is more than weights (it refers to getattr' in refused
    assert not trace.exists()
    assert missing.startswith(f'ERROR checkpoint hf://{nothing} cannot be downloaded: ')
    assert 'EntryNotFound' in missing
    fetched = [path for method, path in asked if method == 'GET' and 'resolve' in path]
    assert sorted(fetched) == [f'/hustvl/Vim/resolve/main/{name}.pth' for name in ('bad', 'vim')]

    asked.clear()
    said, missing = read({**environment, 'HF_HUB_OFFLINE': '1'}, good, nothing)
    assert said == expected and 'ERROR' in missing and not asked


@pytest.mark.parametrize('address', ['hf://vim.pth', 'hf://hustvl/vim.pth', 'hf://a/b/', 'hf://'])
def test_addresses_have_an_owner_a_repository_and_a_file(address):
    with pytest.raises(CheckpointError, match='hf://OWNER/REPO/FILE was expected'):
        load_checkpoint(address)


def test_without_the_client_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(CheckpointError, match='x.pth needs .* pip install huggingface_hub'):
        load_checkpoint('hf://a/b/x.pth')
