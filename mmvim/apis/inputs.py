"""Which pictures are meant by files, folders and patterns, and what their results are called."""

from __future__ import annotations

import glob
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from mmvim.utils.launch import UserError

from .pictures import is_picture

__all__ = ['Skipped', 'Source', 'find_pictures']


class Source(NamedTuple):
    """A picture to predict."""

    path: Path
    name: PurePath  # of its results, without a suffix


class Skipped(NamedTuple):
    """A file that is not predicted, and why."""

    path: Path
    reason: str


def find_pictures(inputs: Sequence[str], out_dir: Path) -> tuple[list[Source], list[Skipped]]:
    """Find pictures, each once, in the order of the inputs and of their names.

    Folders are searched with all below them and linked there, except hidden files and what lies in
    ``out_dir``.
    Results are called as the picture within the folder that was given, without its suffix. Where
    two would be called alike, they keep the suffix, and where that is not enough the folders by
    which they differ.

    Args:
        inputs (Sequence[str]): Files, folders, and patterns as of :func:`glob.glob`, in which
            ``**`` stands for any folders.
        out_dir (Path): Where results go.

    Raises:
        UserError: Two pictures would have results of one name nevertheless.
    """
    pictures: dict[Path, PurePath] = {}  # path: what it is called within its input
    skipped: dict[Path, str] = {}
    seen = set()
    out_dir = out_dir.resolve()
    for given in inputs:
        errors: dict[Path, str] = {}
        found = list(_expand(given, errors))
        skipped |= errors
        if not found and not errors:
            skipped[Path(given)] = 'there is no such file or folder'
        for path, name in found:
            place = Path(os.path.realpath(path))  # resolve() fails at a link to itself
            within = place.is_relative_to(out_dir)
            if place in seen or (within and path != Path(given)):
                continue
            seen.add(place)
            if within:
                skipped[path] = 'it lies in the folder for results'
            elif not is_picture(path):
                skipped[path] = f'unknown type {path.suffix}'.rstrip()
            elif path.is_file():
                pictures[path] = name
            else:  # a link to nothing, or a pipe, which one would wait for
                skipped[path] = 'it is no file'
    names = _names(pictures)
    return [Source(*item) for item in names.items()], [Skipped(*item) for item in skipped.items()]


def _expand(given: str, errors: dict[Path, str]) -> Iterator[tuple[Path, PurePath]]:
    """Files, and what they are called within the input; ``errors`` gets folders that are locked."""
    path = Path(given).expanduser()
    if path.is_dir():
        for file in _walk(path, errors):
            yield file, file.relative_to(path)
    elif path.exists():
        yield path, PurePath(path.name)
    elif glob.has_magic(given):
        parts = path.parts
        fixed = next(k for k, part in enumerate(parts) if glob.has_magic(part))
        root = Path(*parts[:fixed])
        for match in map(Path, sorted(glob.glob(str(path), recursive=True))):
            within = match.relative_to(root)
            if match.is_dir():
                yield from (
                    (file, within / file.relative_to(match)) for file in _walk(match, errors)
                )
            else:
                yield match, within


def _walk(root: Path, errors: dict[Path, str]) -> Iterator[Path]:
    """Files of a folder and of those below it, linked ones last, each folder once."""

    def note(error: OSError) -> None:
        errors[Path(error.filename)] = error.strerror or str(error)

    seen = {root.resolve()}
    for place, names, files in os.walk(root, onerror=note, followlinks=True):
        folder = Path(place)
        shown = sorted(name for name in names if not name.startswith('.'))
        names.clear()
        for name in sorted(shown, key=lambda name: (folder / name).is_symlink()):
            where = (folder / name).resolve()
            if where not in seen:
                seen.add(where)
                names.append(name)
        yield from (folder / name for name in sorted(files) if not name.startswith('.'))


def _names(pictures: dict[Path, PurePath]) -> dict[Path, PurePath]:
    common = os.path.commonpath([path.absolute().parent for path in pictures]) if pictures else ''
    ways: list[Callable[[Path, PurePath], PurePath]] = [
        lambda path, name: name.with_suffix(''),
        lambda path, name: name,
        lambda path, name: PurePath(path.absolute().relative_to(common)),
    ]
    names = {path: ways[0](path, name) for path, name in pictures.items()}
    for way in ways[1:]:
        for path in (path for alike in _alike(names) for path in alike):
            names[path] = way(path, pictures[path])
    for first, second, *_ in _alike(names):
        raise UserError(
            f'the results of {first} and {second} would both be called {names[first]}: '
            'predict them into different folders'
        )
    return names


def _alike(names: dict[Path, PurePath]) -> list[list[Path]]:
    """Pictures whose results would overwrite each other, on file systems that ignore case too."""
    groups = defaultdict(list)
    for path, name in names.items():
        groups[str(name).casefold()].append(path)
    return [paths for paths in groups.values() if len(paths) > 1]
