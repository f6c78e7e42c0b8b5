"""A benchmark's results as JSON, as tables and as pictures."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from .worker import Result

__all__ = ['by_setting', 'load', 'markdown', 'plot', 'rows', 'save']

MIB = 2**20
HEADER = (
    *('model', 'part', 'size', 'tokens', 'batch', 'images/s', 'ms', 'spread', 'memory MiB'),
    *('M parameters', 'GFLOPs'),
)


def median(result: Result) -> float | None:
    """Seconds of a step."""
    return statistics.median(result.times) if result.times else None


def images_per_second(result: Result) -> float | None:
    seconds = median(result)
    return result.subject.batch_size / seconds if seconds else None


def spread(result: Result) -> float:
    """Half of what lies between the fastest and the slowest step, as part of the median."""
    return (max(result.times) - min(result.times)) / 2 / median(result)


def save(path: Path, results: list[Result], machine: dict) -> None:
    """Write everything that was measured."""
    data = dict(machine=machine, results=[result.to_dict() for result in results])
    path.write_text(json.dumps(data, indent=1) + '\n')


def load(path: Path) -> tuple[list[Result], dict]:
    """Read what :func:`save` wrote.

    Raises:
        ValueError: The file is something else.
    """
    try:
        data = json.loads(path.read_text())
        return [Result.from_dict(entry) for entry in data['results']], data['machine']
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f'{path} is no result of this benchmark: {error!r}') from None


def by_setting(results: list[Result]) -> dict[str, list[Result]]:
    """The results of each mode, dtype and run, which have a table each."""
    tables: dict[str, list[Result]] = {}
    for result in results:
        tables.setdefault(result.subject.setting, []).append(result)
    return tables


def rows(results: list[Result], baseline: list[Result] = ()) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table; with a baseline also how many times its speed and memory."""
    earlier = {(r.subject, r.tokens): r for r in baseline}
    header = [*HEADER, *(['speed / baseline', 'memory / baseline'] if baseline else [])]
    held = any(result.subject.isa for result in results)
    if held:
        header.insert(1, 'ISA')
    table = []
    for result in results:
        subject, speed = result.subject, images_per_second(result)
        cells = [subject.model, *([subject.isa] if held else [])]
        cells += [subject.part, str(subject.size), number(result.tokens)]
        cells.append(str(subject.batch_size or 'max'))
        if speed is None:
            cells += [result.status, '', '']
        else:
            cells += [f'{speed:.3g}', f'{1e3 * median(result):.1f}', f'±{spread(result):.0%}']
        cells.append(number(result.memory, MIB, '.0f'))
        cells += [number(result.parameters, 1e6, '.2f'), number(result.flops, 1e9, '.2f')]
        if baseline:
            before = earlier.get((subject, result.tokens))
            cells += [
                ratio(images_per_second(result), before and images_per_second(before)),
                ratio(result.memory, before and before.memory),
            ]
        table.append(cells)
    return header, table


def number(value: float | None, unit: float = 1, form: str = '.0f') -> str:
    return '' if value is None else format(value / unit, form)


def ratio(value: float | None, reference: float | None) -> str:
    return f'{value / reference:.2f}' if value and reference else ''


def markdown(results: list[Result], baseline: list[Result], machine: dict) -> str:
    """A table for each setting with what they were measured on above them."""
    lines = [f'{key}: {value}  ' for key, value in machine.items()]
    for setting, some in by_setting(results).items():
        header, table = rows(some, baseline)
        lines += ['', f'## {setting}', '']
        lines += ['| ' + ' | '.join(row) + ' |' for row in (header, ['---'] * len(header), *table)]
    return '\n'.join(lines) + '\n'


def plot(path: Path, results: list[Result], title: str) -> None:
    """Draw speed and memory over the resolution, both axes logarithmic, one line per model and one
    row per setting."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    settings = by_setting(results) or {'': []}
    size = (11, 0.5 + 4 * len(settings))
    figure, panels = plt.subplots(
        len(settings), 2, figsize=size, layout='constrained', squeeze=False
    )
    for (speed, memory), (setting, some) in zip(panels, settings.items(), strict=True):
        draw(speed, memory, some)
        speed.set_title(setting, loc='left')
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw(speed, memory, results: list[Result]) -> None:
    """Fill the two axes of one setting."""
    results = [result for result in results if result.times]
    lines = list(dict.fromkeys((r.subject.model, r.subject.isa) for r in results))
    sizes = sorted({result.subject.size for result in results})
    for model, isa in lines:
        done = [r for r in results if (r.subject.model, r.subject.isa) == (model, isa)]
        line = '-' if model.startswith('vim') else '--'
        style = dict(marker='o', linestyle=line, label=f'{model} {isa}'.rstrip())
        speed.plot([r.subject.size for r in done], [images_per_second(r) for r in done], **style)
        known = [r for r in done if r.memory]
        memory.plot([r.subject.size for r in known], [r.memory / MIB for r in known], **style)
    for axes, name in ((speed, 'images / s'), (memory, 'peak memory of a step, MiB')):
        axes.set(xlabel='image side, pixels', ylabel=name)
        if not any(len(line.get_xdata()) for line in axes.lines):
            continue  # nothing is known, and no logarithm of it
        axes.set(xscale='log', yscale='log')
        axes.set_xticks(sizes, [str(size) for size in sizes], rotation=45)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
