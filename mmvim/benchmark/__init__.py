"""Speed, memory and growth of backbones and whole models; ``tools/benchmark.py`` is the way in."""
