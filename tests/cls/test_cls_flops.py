"""get_flops.py on a classifier."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / 'tools'))
from command_line import passed, tool


def test_a_classifier_by_parts():
    config = 'configs/vim/vim-tiny_8xb128_in1k.py'
    output = passed(tool('analysis_tools/get_flops.py', config, '--shape', 64))
    rows = [line.split() for line in output.splitlines()]
    cells = {row[0]: row[1:] for row in rows if row and row[0] in ('backbone', 'head', 'total')}
    head = 2 * 192 * 1000 / 1e9
    assert cells['head'][:2] == ['0.193', f'{head:.4f}']
    assert cells['total'][0] == '7.148'
    assert abs(float(cells['backbone'][1]) + head - float(cells['total'][1])) < 2e-4
