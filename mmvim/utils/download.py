"""Fetching checkpoints from the network into torch's cache."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import urllib.request
import uuid
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlparse

import torch
from mmengine.dist import barrier, get_local_rank, is_distributed
from mmengine.logging import print_log

from .checkpoint_error import CheckpointError

__all__ = ['download', 'download_from_hub']


def download(url: str) -> str:
    """Fetch a file once; later calls find it in ``checkpoints`` of torch's hub folder.

    The name in the cache contains a digest of the address, as two addresses may end alike. In a
    distributed run one process of each machine downloads and the others wait for it.

    Args:
        url (str): Address of the file.

    Returns:
        str: Path of the file.

    Raises:
        CheckpointError: There is no answer, an error for an answer, or less than was announced.
    """
    name = os.path.basename(urlparse(url).path) or 'checkpoint'
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]
    path = Path(torch.hub.get_dir(), 'checkpoints', f'{digest}-{name}')
    if not is_distributed():
        _fetch(url, path)
    else:
        try:
            if get_local_rank() == 0:
                _fetch(url, path)
        finally:
            barrier()
        _fetch(url, path)
    return str(path)


def download_from_hub(address: str) -> str:
    """Fetch a file from the Hugging Face Hub, or find it in the cache of the Hub's client.

    The client's own environment variables hold, such as ``HF_HOME``, ``HF_ENDPOINT``,
    ``HF_HUB_OFFLINE`` and ``HF_TOKEN``. It keeps processes from downloading at the same time.

    Args:
        address (str): ``hf://OWNER/REPO/FILE``, or ``hf://OWNER/REPO@REVISION/FILE``.

    Returns:
        str: Path of the file.

    Raises:
        CheckpointError: The address is of another form, the client is not installed, or it cannot
            get the file; the message has its reason.
    """
    match = re.fullmatch(r'hf://([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)', address)
    if match is None:
        raise CheckpointError(f'checkpoint {address}: hf://OWNER/REPO/FILE was expected')
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise CheckpointError(
            f'checkpoint {address} needs the package huggingface_hub: pip install huggingface_hub'
        ) from None
    repository, revision, filename = match.groups()
    try:
        return hf_hub_download(repository, filename, revision=revision)
    except Exception as error:  # of the client, of whatever it connects with, of the file system
        reason = ' '.join(str(error).split())
        raise CheckpointError(
            f'checkpoint {address} cannot be downloaded: {type(error).__name__}: {reason}'
        ) from None


def _fetch(url: str, path: Path) -> None:
    """Write the file whole or not at all."""
    if path.exists():
        return
    print_log(f'downloading {url} to {path}', logger='current')
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'{path.name}.{uuid.uuid4().hex[:8]}')
    try:
        with open(partial, 'xb') as file, urllib.request.urlopen(url, timeout=60) as answer:
            shutil.copyfileobj(answer, file, 1 << 20)
            size, announced = file.tell(), answer.headers.get('Content-Length')
        if announced is not None and size != int(announced):
            raise CheckpointError(
                f'checkpoint {url}: the download ended after {size} of {announced} bytes'
            )
        partial.replace(path)
    except (OSError, HTTPException) as error:  # urllib's are OSErrors
        raise CheckpointError(f'checkpoint {url} cannot be downloaded: {error}') from None
    finally:
        partial.unlink(missing_ok=True)
