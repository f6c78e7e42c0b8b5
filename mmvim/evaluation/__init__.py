"""Metrics, and predictions for later evaluation."""

from importlib.util import find_spec

if find_spec('mmseg') is not None:
    from .dump_seg_results import DumpSegResults  # noqa: F401
