"""The table of the directions is made in pieces: what is done is kept, the rest is trained."""

import json

import pytest
from command_line import passed, refused, tool


@pytest.mark.slow
def test_runs_are_kept_and_tabulated(tmp_path):
    common = [
        '--data',
        tmp_path / 'data',
        '--train',
        4,
        '--val',
        2,
        '--work-dir',
        tmp_path / 'work',
    ]
    common += ['--seeds', 0, 1, '--directions', 'none', 'block']
    short = ['--cfg-options', 'train_cfg.max_iters=2', 'model.backbone.arch.depth=2']

    output = passed(tool('analysis_tools/ablate_directions.py', *common, '--max-runs', 1, *short))
    assert '1 of 4 runs' in output
    logs = {path: path.read_text() for path in (tmp_path / 'work').glob('*/train.log')}
    assert [path.parent.name for path in logs] == ['none_seed0']

    output = passed(tool('analysis_tools/ablate_directions.py', *common, '--max-runs', 1, *short))
    assert '2 of 4 runs' in output
    assert all(path.read_text() == log for path, log in logs.items())  # not trained again
    results = json.loads((tmp_path / 'work/results.json').read_text())
    scores = {name: run['0']['mIoU'] for name, run in results['runs'].items()}
    table = (tmp_path / 'work/table.md').read_text()
    for name, score in scores.items():
        assert f'| `{name}` | {score:.1f} |  | {score:.1f} |  |' in table

    assert table.splitlines()[-1].startswith('| colour alone | | | ')

    other = ['--cfg-options', 'train_cfg.max_iters=3']
    message = refused(tool('analysis_tools/ablate_directions.py', *common, *other))
    assert 'none_seed0 was trained with' in message and 'choose another --work-dir' in message
