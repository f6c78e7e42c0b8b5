"""``tools/predict.py`` without a process of its own, for the tests of it."""

import importlib.util
import sys

import pytest
from command_line import ROOT


@pytest.fixture
def command(monkeypatch, capsys, tmp_path, guard):
    """Calls ``predict.py`` in this process and in an empty folder; returns what it prints."""
    spec = importlib.util.spec_from_file_location('predict_tool', ROOT / 'tools' / 'predict.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)

    def call(*arguments) -> str:
        monkeypatch.setattr(sys, 'argv', ['predict.py', *map(str, arguments)])
        module.run(module.main)
        return capsys.readouterr().out

    return call
