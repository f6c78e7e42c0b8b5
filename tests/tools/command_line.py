"""Running the command line tools in tests."""

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Tools run in forks of a process that has done the imports, which take longer than most tools.
PROCESSES = multiprocessing.get_context('forkserver')
PROCESSES.set_forkserver_preload(['mmseg.apis', 'mmdet.apis', 'mmvim'])


def tool(name: str, *arguments, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = [str(ROOT / 'tools' / name), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ('stdout', 'stderr')]
        given = command, cwd, dict(os.environ), outputs
        process = PROCESSES.Process(target=_run, args=given)
        process.start()
        process.join()
        texts = [path.read_text() for path in outputs]
    return subprocess.CompletedProcess(command, process.exitcode, *texts)


def _run(command: list[str], cwd: Path, env: dict[str, str], outputs: list[Path]) -> None:
    """What ``python command`` does, in this process."""
    for descriptor, path in enumerate(outputs, start=1):
        with path.open('wb') as file:
            os.dup2(file.fileno(), descriptor)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv[:] = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name='__main__')


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
