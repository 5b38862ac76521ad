"""Verifiers that may hang or eat memory, in a process of their own that any thread may ask."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import math
import os
import pathlib
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from ftjax.rewards import sandbox

_SCRIPT = pathlib.Path(__file__).with_name("verifier.py")
_START_SECONDS = 120.0
_TOGETHER = 16
"""Items of one question, for which it is nobody else's."""
_LIMITS = sandbox.Limits(seconds=3600.0, memory_bytes=4 << 30, file_bytes=64 << 20, processes=32)


class WorkerError(RuntimeError):
    """A verifier gave no answer."""


class NotStarted(WorkerError):
    """A verifier cannot answer anything: its library does not load."""


class Worker:
    """One verifier, started when it is first asked and again after it has died.

    Signals, with which libraries limit their own time, work in the main thread alone; killing a process works from all, and also ends
    what never looks at a signal (a power of towers in one multiplication).
    """

    def __init__(self, name: str, module: str, *, isolated: bool):
        """Say what to run: `name` of a function in `verifier`, the library `module` it needs, and whether in a jail of `sandbox`."""
        self.name, self.module, self.isolated = name, module, isolated
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._jail: sandbox.Jail | None = None
        self._buffer = b""
        atexit.register(self.close)

    def ask(self, items: Sequence[dict[str, Any]], *, seconds: float, together: bool, most: float = math.inf) -> list[dict[str, Any]]:
        """Return the verifier's answer to each item, `{"value": …}` or `{"error": …}`; `{"late": …}` where it was not asked any more.

        Args:
          items: what to answer.
          seconds: of each.
          most: seconds after which no further one is asked.
          together: share a process while nothing goes wrong, which is faster; not for verifiers that run what a model wrote.

        Raises:
          NotStarted: the verifier does not load.
          WorkerError: it broke off.
        """
        found, deadline = [], time.monotonic() + most
        for at in range(0, len(items), _TOGETHER):
            part = items[at : at + _TOGETHER]
            late = time.monotonic() > deadline
            found += [{"late": f"those before took {most:g} s"} for _ in part] if late else self._ask(part, seconds, together)
        return found

    def _ask(self, items: Sequence[dict[str, Any]], seconds: float, together: bool) -> list[dict[str, Any]]:
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            try:
                self._write(json.dumps({"items": list(items), "seconds": seconds, "together": together}))
                return json.loads(self._read(seconds * len(items) + 10.0))
            except (OSError, ValueError) as error:
                self._stop()
                raise WorkerError(f"{self.name}: the verifier broke off ({error})") from error

    def close(self) -> None:
        """End the process, also while it is asked; a later question starts another."""
        process = self._process
        if process is not None and process.poll() is None:  # so that whoever listens to it lets go of the lock
            process.terminate() if self._jail is not None else _kill(process)
        with self._lock:
            self._stop()

    def _start(self) -> None:
        self._stop()
        folders = _folders(self.module)
        if self.isolated:
            sandbox.check()
            argv = [sandbox.PYTHON, "-I", "/program/main.py", self.name]
            files = {"main.py": _SCRIPT.read_text(encoding="utf-8")}
            self._jail = sandbox.start(argv, files=files, stdin=None, limits=_LIMITS, readable=folders, leash=False)
            self._process = self._jail.process
        else:
            pipe = subprocess.PIPE
            command = [sys.executable, "-I", str(_SCRIPT), self.name]
            # A session of its own: Ctrl-C is for who asks, and saves first.
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
        try:
            self._write(json.dumps(folders))
            if self._read(_START_SECONDS) != b"ready":
                raise OSError("it is not ready")
        except OSError as error:
            why = self._last_words()
            self._stop()
            raise NotStarted(f"{self.name}: the verifier did not start ({error}) {why}") from error

    def _stop(self) -> None:
        if self._jail is not None:
            self._jail.close()
        elif self._process is not None:
            _kill(self._process)
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
                if stream is not None:
                    with contextlib.suppress(OSError):  # what was written and not read
                        stream.close()
        self._process, self._jail, self._buffer = None, None, b""

    def _last_words(self) -> str:
        """Return the end of what it wrote to its standard error, if it has ended."""
        assert self._process and self._process.stderr
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            return ""
        return self._process.stderr.read().decode("utf-8", "replace")[-500:]

    def _write(self, line: str) -> None:
        assert self._process and self._process.stdin
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def _read(self, seconds: float) -> bytes:
        assert self._process and self._process.stdout
        deadline, stream = time.monotonic() + seconds, self._process.stdout.fileno()
        while b"\n" not in self._buffer:
            if not select.select([stream], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise OSError(f"no word within {seconds:g} s")
            chunk = os.read(stream, 1 << 16)
            if not chunk:
                raise OSError("it ended")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a verifier and the fork in which it answers, which may never look up."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _folders(module: str) -> list[str]:
    """Return the folders of installed packages, the module's own among them."""
    spec = importlib.util.find_spec(module)
    own = [str(pathlib.Path(spec.origin).parent.parent)] if spec and spec.origin else []
    installed = [path for path in sys.path if pathlib.Path(path).name.endswith("-packages") and pathlib.Path(path).is_dir()]
    return list(dict.fromkeys(os.path.realpath(path) for path in (*own, *installed)))
