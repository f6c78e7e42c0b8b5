"""Loading checkpoints as weights only, so that a file cannot run code.

A checkpoint is a pickle, and unpickling can execute anything. ``torch.load(weights_only=True)``
admits tensors, plain containers and an allow-list, to which this project adds the readers of
:mod:`mmvim.utils.inert`. Files whose format torch hands to another reader are refused beforehand.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import re
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from mmengine.runner import CheckpointLoader

from .checkpoint_error import CheckpointError, damaged
from .download import download, download_from_hub
from .safetensors_file import load_safetensors

__all__ = [
    'CheckpointError',
    'guard_checkpoints',
    'load_checkpoint',
    'load_from_http',
    'load_from_hub',
    'load_from_local',
]

FORCE, FORCE_NOT = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD', 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'
TRUST = (
    'If you trust where the file comes from, pass --trust-checkpoint to the command line tools, or '
    'call mmvim.utils.guard_checkpoints(trust=True) in a script of your own.'
)

# Whether this process runs code from checkpoints: guard_checkpoints decides for all ways in.
_trusted = False


def guard_checkpoints(trust: bool = False) -> None:
    """Make every checkpoint that mmengine loads in this process weights only.

    What ``init_cfg`` of this project's backbones names is read as weights only without a guard,
    too; this covers ``load_from``, ``resume``, and the ``init_cfg`` of any other module.

    Args:
        trust (bool): True lifts the protection instead, everywhere: files may then run code.
    """
    global _trusted
    _trusted = trust
    for prefixes, loader in (('', load_from_local), (('http://', 'https://'), load_from_http)):
        CheckpointLoader.register_scheme(prefixes=prefixes, loader=loader, force=True)
    # Object stores and model zoos stay with mmengine's loaders, some of which ask torch for full
    # unpickling.
    wanted, other = (FORCE_NOT, FORCE) if trust else (FORCE, FORCE_NOT)
    os.environ[wanted] = '1'
    os.environ.pop(other, None)


def load_checkpoint(source: str, map_location: str | None = 'cpu') -> dict:
    """Load a checkpoint from anywhere without executing anything in it.

    Args:
        source (str): A path, or an address that this module or mmengine's ``CheckpointLoader``
            knows, such as ``https://…``, ``hf://OWNER/REPO/FILE`` or ``s3://…``.
        map_location (str, optional): As in :func:`torch.load`.

    Raises:
        CheckpointError: As :func:`load_from_local`, or the file cannot be fetched.
    """
    if source.startswith(('http://', 'https://')):
        return load_from_http(source, map_location)
    if source.startswith('hf://'):
        return load_from_hub(source, map_location)
    if '://' not in source:
        return load_from_local(source, map_location)
    if _trusted:
        return CheckpointLoader.load_checkpoint(source, map_location)
    with _weights_only():
        try:
            return CheckpointLoader.load_checkpoint(source, map_location)
        except pickle.UnpicklingError as error:
            raise _refused(source, _type_in_the_way(error) or _first_line(error)) from None


def load_from_http(url: str, map_location: str | None = 'cpu') -> dict:
    """Download a checkpoint, unless it has been downloaded before, and load it.

    Args:
        url (str): An address that begins with ``http://`` or ``https://``.
        map_location (str, optional): As in :func:`torch.load`.

    Raises:
        CheckpointError: The file cannot be downloaded, or as :func:`load_from_local`.
    """
    return load_from_local(download(url), map_location, source=url)


@CheckpointLoader.register_scheme(prefixes='hf://', force=True)
def load_from_hub(address: str, map_location: str | None = 'cpu') -> dict:
    """Load a checkpoint from the Hugging Face Hub, through its client and the client's cache.

    Args:
        address (str): ``hf://OWNER/REPO/FILE``, or ``hf://OWNER/REPO@REVISION/FILE``.
        map_location (str, optional): As in :func:`torch.load`.

    Raises:
        CheckpointError: The client is not installed or cannot get the file, or as
            :func:`load_from_local`.
    """
    return load_from_local(download_from_hub(address), map_location, source=address)


def load_from_local(
    filename: str, map_location: str | None = 'cpu', source: str | None = None
) -> dict:
    """Load a local checkpoint without executing anything in it.

    Args:
        filename (str): Path of the file, a pickle of torch or ``.safetensors``.
        map_location (str, optional): As in :func:`torch.load`.
        source (str, optional): Where the file comes from, for messages; default: its path.

    Raises:
        CheckpointError: The file is missing, damaged, or holds more than weights; the message says
            which, and for the last case names the type that was in the way.
    """
    filename = os.path.expanduser(filename)
    name = filename if source is None else f'{source} (downloaded to {filename})'
    if not os.path.isfile(filename):
        raise CheckpointError(f'checkpoint {name}: there is no such file')
    if filename.endswith('.safetensors'):
        return load_safetensors(filename, name)
    if _trusted:
        return torch.load(filename, map_location=map_location, weights_only=False)
    try:
        form = _form(filename)
        if form in ('tar', 'TorchScript'):
            raise _refused(name, f'it is a {form} archive, which torch cannot read as weights only')
        return torch.load(filename, map_location=map_location, weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:
        named = _type_in_the_way(error)
        if named is not None:
            raise _refused(name, named) from None
        reason = _first_line(error)
        if isinstance(error, pickle.UnpicklingError) and form != 'unknown':
            # torch gave up before it came to a type that it does not know.
            types = ', '.join(_pickled_types(filename)) or 'no type'
            raise _refused(name, f'{reason}; it refers to {types}') from None
        raise damaged(name, filename, reason) from None


def _form(filename: str) -> str:
    """What torch would take a file for, beyond what it reads as weights only in every version.

    Versions before 2.6 pass TorchScript and tar archives to readers that run what they hold.
    """
    with open(filename, 'rb') as file:
        start = file.read(4)
    if start == b'PK\x03\x04':
        records = torch._C.PyTorchFileReader(filename).get_all_records()
        return 'TorchScript' if 'constants.pkl' in records else 'zip'
    if tarfile.is_tarfile(filename):
        return 'tar'
    return 'pickle' if start[:1] == b'\x80' else 'unknown'


@contextmanager
def _weights_only() -> Iterator[None]:
    """Within it, torch reads weights only even where its caller asks for everything."""
    before = {name: os.environ.pop(name, None) for name in (FORCE, FORCE_NOT)}
    os.environ[FORCE] = '1'
    try:
        yield
    finally:
        del os.environ[FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _refused(name: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f'checkpoint {name} was refused: it is more than weights ({reason}). To load the rest, '
        f'Python would have to run code from the file. {TRUST}'
    )


def _type_in_the_way(error: Exception) -> str | None:
    """The type or function that an unpickler refused, with what was wrong if a reader says so."""
    match = re.search(r'GLOBAL `?([\w.]+)(?: was refused(: .*))?', str(error))
    return match and f'it refers to {match[1]}{match[2] or ""}'


def _first_line(error: Exception) -> str:
    """What torch says went wrong, without its advice to switch the protection off."""
    lines = (line.replace('WeightsUnpickler error:', '').strip() for line in str(error).split('\n'))
    reasons = [line for line in lines if line and 'weights_only' not in line]
    return reasons[0].split('. ')[0] if reasons else type(error).__name__


def _pickled_types(filename: str, most: int = 5) -> list[str]:
    """The first types and functions that a file's pickles refer to, for messages."""
    if zipfile.is_zipfile(filename):
        with zipfile.ZipFile(filename) as archive:
            records = [name for name in archive.namelist() if name.endswith('data.pkl')]
            content = b''.join(map(archive.read, records))
    else:
        content = Path(filename).read_bytes()
    names: list[str] = []
    strings: list[str] = []
    stream = io.BytesIO(content)
    try:
        while True:  # a file without zip holds several pickles, and numbers after them
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name == 'GLOBAL':
                    names.append(argument.replace(' ', '.'))
                elif opcode.name == 'STACK_GLOBAL':
                    names.append('.'.join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
    except ValueError:
        return list(dict.fromkeys(names))[:most]
