"""A folder whose every file a SHA-256 vouches for: `manifest.json` holds them and is written last, so that what has one is whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator

from etils import epath

MANIFEST = "manifest.json"
PART = ".part"
"""Ends the name of a file that is being written; a killed process may leave one."""
_BLOCK_BYTES = 1 << 20


class Damaged(ValueError):
    """A file is missing, cut short or changed; the message names it."""


def write(folder: epath.Path) -> None:
    """Vouch for the files that a folder now has."""
    files = {str(file.relative_to(folder)): _sha256(file) for file in sorted(_files(folder))}
    write_whole(folder / MANIFEST, json.dumps({"files": files}, indent=1).encode())


def verify(folder: epath.Path, *, only: str | None = None) -> None:
    """Compare every file of a folder with its manifest, or `only` the one of that name.

    Raises:
      Damaged: one differs or is missing, or the manifest itself cannot be read.
    """
    try:
        digests = json.loads((folder / MANIFEST).read_text())["files"]
        named = digests.items() if only is None else [(only, digests[only])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{folder / MANIFEST} cannot be read: {error}.") from error
    for name, digest in named:
        if not (folder / name).exists():
            raise Damaged(f"{folder / name} is missing.")
        if (found := _sha256(folder / name)) != digest:
            raise Damaged(f"{folder / name} was changed or cut short: sha256 {found[:16]}…, expected {digest[:16]}….")


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files(path)
        elif path.name != MANIFEST and not path.name.endswith(PART):
            yield path


def _sha256(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def write_whole(path: epath.Path, content: bytes) -> None:
    """Write a file that is there either whole or not at all."""
    if "://" in str(path):
        path.write_bytes(content)  # an object store shows an object once it is complete
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}{PART}")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
