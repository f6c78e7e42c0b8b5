"""``python -m mmvim_ops``: what there is, why something is missing, whether it is right."""

import torch

from mmvim_ops.__main__ import main
from mmvim_ops.backends import BACKENDS


def lines_of(capsys):
    """Status and output; the latter by backend."""
    status = main()
    return status, {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}


def test_says_which_backends_are_there_and_right(capsys):
    status, lines = lines_of(capsys)
    assert status == 0
    assert f'torch {torch.__version__}' in lines['Python']
    assert 'cpu: ok, error' in lines['torch']
    for name, backend in BACKENDS.items():
        if backend.missing() is not None:
            assert backend.missing() in lines[name]


def test_a_backend_that_is_wrong_is_named_and_fails(capsys, monkeypatch):
    scan = BACKENDS['torch'].scan

    def wrong(call):
        out, last_state = scan(call)
        return 1.01 * out, last_state

    def broken(call):
        raise RuntimeError('out of order')

    for replacement, verdict in (
        (wrong, 'WRONG, error 1e-02'),
        (broken, 'RuntimeError: out of order'),
    ):
        monkeypatch.setattr(BACKENDS['torch'], 'scan', replacement)
        status, lines = lines_of(capsys)
        assert status == 1
        assert verdict in lines['torch']
        assert 'the scan in both directions' in lines['torch']
        assert 'convolution' not in lines['torch']  # it is right
