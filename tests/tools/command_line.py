"""Running the command line tools in tests."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def tool(name: str, *arguments, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / 'tools' / name), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def passed(result: subprocess.CompletedProcess) -> str:
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-3000:]
    return output


def refused(result: subprocess.CompletedProcess) -> str:
    """The message of a tool that ended on purpose: non-zero and without a traceback."""
    assert result.returncode != 0
    assert 'Traceback' not in result.stderr, result.stderr[-3000:]
    return result.stderr.strip().splitlines()[-1]


def scalars(work_dir: Path, key: str) -> list[float]:
    """The logged values of one quantity in the newest run of a work dir."""
    log = max(work_dir.glob('*/vis_data/scalars.json'))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [line[key] for line in lines if key in line]
