"""Untrusted programs, each in a jail of its own: no network, no files but its own, bounded time, memory and output.

`launcher` is the jail; here is the side that stays outside, which starts one, listens, and ends it. Where the kernel gives no isolation
nothing is run: `isolation()` finds out once, by trying.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import platform
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ftjax.rewards import launcher

ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
PYTHON = os.path.realpath(os.path.join(sys.base_exec_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}"))
_START_SECONDS = 30.0
_LAUNCHER = pathlib.Path(__file__).with_name("launcher.py")


class NoIsolation(RuntimeError):
    """A machine that isolates no process runs nothing untrusted."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one program may use."""

    seconds: float = 5.0
    """Of the clock; as many of each process's CPU, rounded up."""
    memory_bytes: int = 256 << 20
    """Address space of each process."""
    file_bytes: int = 16 << 20
    """All files it writes together; they are memory too, and gone with it."""
    processes: int = 8
    """Processes and threads."""
    output_bytes: int = 1 << 16
    """Standard output and error, each."""


class Ran(NamedTuple):
    """How a program ended."""

    stdout: str
    stderr: str
    exit_code: int | None
    """Negative: the signal that ended it. None: it was ended from outside."""
    ended: str
    """"exit", "time" or "output": it stopped by itself, took too long, or wrote too much."""


def run(
    program: str,
    *,
    stdin: str = "",
    limits: Limits = Limits(),
    readable: Sequence[str] = (),  # noqa: B008, a frozen value
) -> Ran:
    """Run a Python program, standard library only, in a jail, and return what it wrote.

    Args:
      program: its text.
      stdin: what it may read.
      limits: what it may use.
      readable: folders that it may read beside the interpreter's.

    Raises:
      NoIsolation: the kernel gives none.
    """
    check()
    return _run(program, stdin, limits, readable)


def check() -> None:
    """Raise `NoIsolation` where a program could not be isolated."""
    if why := isolation():
        raise NoIsolation(
            f"sandbox: this machine does not isolate processes ({why}), so untrusted code is not run. It takes Linux 5.12 or later that "
            "lets this user make user namespaces: see /proc/sys/user/max_user_namespaces, AppArmor's restriction of them (Ubuntu) and "
            "the seccomp profile of a container."
        )


@functools.cache
def isolation() -> str | None:
    """Return why programs cannot be isolated here, or None where one was, and saw nothing of the outside."""
    if sys.platform != "linux":
        return f"{sys.platform} is not Linux"
    if platform.machine() not in launcher.ARCHITECTURES:
        return f"no list of system calls for {platform.machine()}; there is one for {', '.join(launcher.ARCHITECTURES)}"
    with tempfile.NamedTemporaryFile() as outside:
        probe = f"import os\nprint(os.getuid(), os.getpid(), os.path.exists({outside.name!r}), os.path.exists('/proc/self'))\n"
        try:
            ran = _run(probe, "", Limits(seconds=20.0), ())
        except (NoIsolation, OSError) as error:
            return str(error)
    if ran.stdout.split() != [str(launcher.NOBODY), "2", "False", "False"]:
        return f"a program in the jail saw {ran.stdout!r} {ran.stderr[-300:]!r} and ended by {ran.ended}"
    return None


@dataclasses.dataclass(frozen=True)
class Jail:
    """A program that runs; `close` ends it and whatever it started."""

    process: subprocess.Popen[bytes]
    status: int
    """Where the launcher reports, a file descriptor."""

    def close(self) -> None:
        """End it all, and wait until it is over."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(5.0)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):  # what was written and not read
                    stream.close()
        os.close(self.status)


def start(
    argv: Sequence[str], *, files: Mapping[str, str], stdin: str | None, limits: Limits, readable: Sequence[str], leash: bool = True
) -> Jail:
    """Start a program in a jail; its output comes by pipes.

    Args:
      argv: the program and its arguments, as named inside.
      files: what stands in `/program`, by name.
      stdin: what it reads; None: it gets a pipe.
      limits: `seconds` counts for CPU time here; the clock is the caller's.
      readable: absolute paths without symbolic links.
      leash: whether it ends with the thread that started it.
    """
    spec = {
        "argv": list(argv),
        "files": {**files, **({} if stdin is None else {"stdin": stdin})},
        "stdin": stdin,
        "readable": [os.path.realpath(sys.base_prefix), *readable],
        "environment": ENVIRONMENT,
        "limits": {**dataclasses.asdict(limits), "cpu_seconds": int(limits.seconds) + 1},
        "leash": leash,
    }
    status, reporting = os.pipe()
    with tempfile.TemporaryFile() as file:  # not a pipe: it may be longer than one holds
        file.write(json.dumps(spec).encode())
        file.seek(0)
        command = [PYTHON, "-I", "-S", str(_LAUNCHER), str(file.fileno()), str(reporting)]
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL if stdin is not None else subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(file.fileno(), reporting),
                start_new_session=True,
                env={},
                cwd="/",
            )
        except BaseException:
            os.close(status)
            raise
        finally:
            os.close(reporting)
    return Jail(process, status)


def _run(program: str, stdin: str, limits: Limits, readable: Sequence[str]) -> Ran:
    argv = [PYTHON, "-I", "/program/main.py"]
    jail = start(argv, files={"main.py": program}, stdin=stdin, limits=limits, readable=readable)
    try:
        assert jail.process.stdout and jail.process.stderr
        streams = {jail.process.stdout.fileno(): bytearray(), jail.process.stderr.fileno(): bytearray(), jail.status: bytearray()}
        ended = _listen(streams, jail.status, limits)
    finally:
        jail.close()
    stdout, stderr, status = (bytes(data) for data in streams.values())
    reports: dict[str, object] = {}
    for line in status.splitlines():
        reports |= json.loads(line)
    if "error" in reports or (ended == "exit" and "started" not in reports):
        raise NoIsolation(str(reports.get("error") or f"the launcher failed: {stderr.decode('utf-8', 'replace')[-300:]}"))
    code = reports.get("exit") if ended == "exit" else None
    return Ran(stdout.decode("utf-8", "replace"), stderr.decode("utf-8", "replace"), code if isinstance(code, int) else None, ended)


def _listen(streams: Mapping[int, bytearray], status: int, limits: Limits) -> str:
    """Read all streams until they close; return how that came. The clock starts with the program, whose start is the first status."""
    deadline, started = time.monotonic() + _START_SECONDS, False
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                return "time"
            for key, _ in selector.select(left):
                chunk = os.read(key.fd, 1 << 16)
                if not chunk:
                    selector.unregister(key.fd)
                streams[key.fd].extend(chunk)
                if not started and streams[status]:
                    deadline, started = time.monotonic() + limits.seconds, True
                if key.fd != status and len(streams[key.fd]) > limits.output_bytes:
                    return "output"
    return "exit"
