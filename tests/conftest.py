"""Tests of classification need mmpretrain, which has an environment of its own."""

from importlib.util import find_spec

HERE = find_spec('mmpretrain') is not None
collect_ignore = [] if HERE else ['cls']


def pytest_terminal_summary(terminalreporter) -> None:
    if not HERE:
        terminalreporter.write_line('tests/cls needs mmpretrain: `make test-cls` runs it')
