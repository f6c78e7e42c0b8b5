"""Make ``mmvim_ops`` importable from a checkout that is not installed."""
import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec('mmvim_ops') is None:
    sys.path.insert(0, str(Path(__file__).parents[2] / 'ops'))
