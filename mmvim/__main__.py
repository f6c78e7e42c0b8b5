"""The project's tools from anywhere: ``python -m mmvim train CONFIG`` is ``tools/train.py CONFIG``.

Configs of this project are found by their names in the repository, such as ``configs/vim/….py``.
"""

import runpy
import sys
from pathlib import Path

TOOLS = Path(__file__).parent / '.mim' / 'tools'


def main() -> None:
    tools = {path.stem: path for path in sorted(TOOLS.resolve().rglob('*.py'))}
    if len(sys.argv) < 2 or sys.argv[1] not in tools:
        sys.exit(f'usage: python -m mmvim TOOL [arguments]; TOOL is one of {", ".join(tools)}')
    path = tools[sys.argv.pop(1)]
    sys.argv[0] = str(path)
    sys.path.insert(0, str(path.parent))  # as for a script
    runpy.run_path(str(path), run_name='__main__')


if __name__ == '__main__':
    main()
