import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

from mmvim.utils import CheckpointError, load_from_local


class Hostile:
    """Unpickling this runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize('legacy', [False, True])
def test_hostile_pickles_are_refused_unread(tmp_path, legacy):
    path, trace = tmp_path / 'hostile.pth', tmp_path / 'trace'
    content = {'state_dict': {}, 'x': Hostile(f'touch {trace}')}
    if legacy:
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    message = 'hostile.pth was refused' + ('' if legacy else '.*system') + '.*--trust-checkpoint'
    with pytest.raises(CheckpointError, match=message):
        load_from_local(str(path))
    assert not trace.exists()


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


@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64', 'int64', 'uint8', 'bool'])
def test_what_mmengine_saves_is_admitted(tmp_path, dtype):
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    score = np.array([0, 1]).astype(dtype)
    content = {'message_hub': {'loss': history, 'best_score': score[1]}, 'scores': score}
    torch.save(content, tmp_path / 'own.pth')
    loaded = load_from_local(str(tmp_path / 'own.pth'))
    assert loaded['message_hub']['loss'].mean() == 1.5
    assert loaded['message_hub']['best_score'] == 1
    assert loaded['scores'].dtype == np.dtype(dtype)


GUARDED = """
import sys
import mmvim
from mmvim.utils import guard_checkpoints
guard_checkpoints(trust=sys.argv[2] == 'trust')
from mmengine.runner.checkpoint import _load_checkpoint
_load_checkpoint(sys.argv[1], map_location='cpu')
"""


@pytest.mark.parametrize('mode', ['guard', 'trust'])
def test_the_guard_covers_mmengines_own_loading(tmp_path, mode):
    path, trace = tmp_path / 'hostile.pth', tmp_path / 'trace'
    torch.save({'x': Hostile(f'touch {trace}')}, path)
    command = [sys.executable, '-c', GUARDED, str(path), mode]
    result = subprocess.run(command, capture_output=True, text=True)
    assert trace.exists() == (mode == 'trust') == (result.returncode == 0), result.stderr
    assert ('was refused' in result.stderr) == (mode == 'guard')
