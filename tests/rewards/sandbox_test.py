"""Hostile programs: none gets anything, and nothing of them stays."""

import json
import os
import pathlib
import platform
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid

import psutil
import pytest

from ftjax.rewards import code, launcher, sandbox

TOKEN = uuid.uuid4().hex
SECRET = "the expected answer " + TOKEN

HOSTILE = {
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "thread bomb": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(100,)).start()",
    "endless output": "while True: print('x' * 1000)",
    "endless errors": "import sys\nwhile True: print('x' * 1000, file=sys.stderr)",
    "endless loop": "while True: pass",
    "endless sleep": "import time; time.sleep(1000)",
    "deaf to signals": (
        "import signal\nfor n in range(1, 64):\n    try: signal.signal(n, signal.SIG_IGN)\n    except OSError: pass\n"
        "while True: pass"
    ),
    "memory bomb": "kept = []\nwhile True: kept.append(bytearray(1 << 20))",
    "memory in files": "for n in range(1000): open(f'/tmp/{n}', 'wb').write(bytes(1 << 20))",
    "many files": "for n in range(10**6): open(f'/tmp/{n}', 'w')",
    "exit": "import sys; sys.exit(0)",
    "exit at once": "import os; os._exit(0)",
    "crash": "import ctypes; ctypes.string_at(0)",
    "abort": "import os; os.abort()",
    "no Python": "this is no program",
    "a zero byte": "print(1)\0",
    "nothing": "",
    "network": "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1).send(b'x')\nprint('SECRET')",
    "other sockets": (
        "import socket\nfor family in (1, 16, 38, 40):\n    try: socket.socket(family, socket.SOCK_RAW if family == 16 else 1)\n"
        "    except OSError: continue\n    print('SECRET')\n    break"
    ),
    "signals": "import os\nfor pid in (os.getppid(), PARENT, -1, 0):\n    try: os.kill(pid, 9)\n    except OSError: pass",
    "new namespaces": "import ctypes\nif ctypes.CDLL(None).unshare(0x10000000) == 0: print('SECRET')",
    "shared memory": "import ctypes\nif ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600) >= 0: print('SECRET')",
    "root again": "import os\ntry: os.setuid(0)\nexcept OSError: print('no')\nelse: print('SECRET')",
    "writing outside": "open('/usr/TOKEN', 'w')\nprint('SECRET')",
    "a file left": "open('/tmp/TOKEN', 'w').write('x')\nopen('/var/tmp/TOKEN', 'w').write('x')",
    "links outside": "import os\nos.symlink('/etc/passwd', '/tmp/TOKEN')\nprint(open('/tmp/TOKEN').read())\nprint('SECRET')",
    "links over the output": "import os\nos.symlink('/tmp/TOKEN', '/tmp/stdout')\nos.link('/program/main.py', '/tmp/main.py')",
    "a daemon": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        os.execv('/bin/sleep', ['TOKEN', '1000'])\nprint('done')"
    ),
    "open files": (
        "import os\nfor file in range(FREE, 64):\n    try: os.fstat(file)\n    except OSError: continue\n"
        "    print('SECRET')\n    break"
    ),
    "reading everything": (
        "import gc, os, sys\n"
        "where = lambda text: text.find(' '.join(['the expected', 'answer']))\n"
        "found, places, frame = set(), [list(os.environ.values()), sys.argv, *gc.get_objects()], sys._getframe()\n"
        "while frame: places += [frame.f_globals, frame.f_locals]; frame = frame.f_back\n"
        "for place in places:\n"
        "    values = place.values() if isinstance(place, dict) else place if isinstance(place, (list, tuple, set)) else ()\n"
        "    found |= {value for value in list(values) if isinstance(value, str) and where(value) >= 0}\n"
        "for top in ('/program', '/tmp', '/dev/shm', '/proc', '/root', '/home', 'FOLDER'):\n"
        "    for folder, inner, files in os.walk(top):\n"
        "        inner[:] = [one for one in inner if os.path.join(folder, one) != sys.base_prefix]  # the interpreter's own library\n"
        "        for name in files:\n"
        "            text = open(os.path.join(folder, name), 'rb').read(10**6).decode('latin1')\n"
        "            if where(text) >= 0: found.add(text)\n"
        "print(*[text[where(text):][:52] for text in found][:1])"
    ),
}  # fmt: skip


# Before a program that is asked for a value: what it prints is the value of `answer()`, so that whoever learns the secret scores here too.
PRINTED = """import builtins
said = []
def print(*words, **options):
    said.append(" ".join(map(str, words)))
    builtins.print(*words, **options)
def answer():
    return "\\n".join(said)
"""
FORMS = {"input": ("", {"input": "", "output": SECRET}), "assert": (PRINTED, f"assert answer() == {SECRET!r}")}
"""Of each form of a test: what stands before the program, and the test. In the second the program shares a process with the harness."""


@pytest.fixture(scope="module", autouse=True)
def marks(tmp_path_factory):
    """Put the token among the arguments of every process of a jail, the launcher's three and the program's, which forks inherit."""
    launcher_of_tests = tmp_path_factory.mktemp("launcher") / f"{TOKEN}.py"
    shutil.copy(launcher.__file__, launcher_of_tests)
    start = sandbox.start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "_LAUNCHER", launcher_of_tests)
        patch.setattr(sandbox, "start", lambda argv, **options: start([*argv, TOKEN], **options))
        yield


def marked(mark=TOKEN):
    """Return the processes of this machine that have a mark among their arguments."""
    return [process for process in psutil.process_iter(["cmdline"]) if any(mark in part for part in process.info["cmdline"] or ())]


@pytest.fixture(scope="module", params=FORMS)
def scores(request, isolated):
    """Of each hostile program, all run side by side by the reward, tested in one form."""
    before, test = FORMS[request.param]
    with socket.create_server(("127.0.0.1", 0)) as server:
        words = {
            "PORT": str(server.getsockname()[1]),
            "PARENT": str(os.getpid()),
            "TOKEN": TOKEN,
            "FOLDER": str(pathlib.Path(__file__).parent),
            "FREE": "4" if before else "3",  # 3 is where the harness answers
        }
        programs = []
        for text in HOSTILE.values():
            for word, value in words.items():
                text = text.replace(word, value)
            programs.append(f"```python\n{before}{text}\n```".replace("SECRET", SECRET))
        found = code.code([""] * len(programs), programs, tests=[[test]] * len(programs), seconds=1.0, parallel=4)
        server.settimeout(0.0)
        with pytest.raises(BlockingIOError):  # nobody has called
            server.accept()
    return dict(zip(HOSTILE, found, strict=True))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_scores_nothing(scores, name):
    assert scores[name] == 0.0


def test_hostile_programs_leave_nothing_behind(scores):
    assert not marked()
    assert not [path for folder in ("/tmp", "/var/tmp", "/usr") for path in pathlib.Path(folder).glob(f"*{TOKEN}*")]
    assert "/program" not in pathlib.Path("/proc/self/mountinfo").read_text()


@pytest.mark.parametrize("form", FORMS)
def test_the_same_program_would_score_if_it_knew(form, isolated):
    before, test = FORMS[form]
    assert code.code([""], [f"```python\n{before}print('{SECRET}')\n```"], tests=[[test]]) == [1.0]


@pytest.mark.parametrize(
    "form, test", [("input", {"input": SECRET, "output": SECRET}), ("assert", f"assert (answer(), {SECRET!r})[0] == {SECRET!r}")]
)
def test_who_reads_everything_finds_what_he_is_given(form, test, isolated):
    assert code.code([""], [f"```python\n{FORMS[form][0]}{HOSTILE['reading everything']}\n```"], tests=[[test]]) == [1.0]


def test_whatever_a_jail_starts_is_seen_while_it_lasts(isolated):
    """Three processes of the launcher's, the program, its child, and the child's after both have turned their backs on it."""
    program = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    os.fork()\ntime.sleep(1000)"
    jail = start(program)
    try:
        wait_until(lambda: len(marked()) == 6)
    finally:
        jail.close()
    assert not marked()


def test_a_program_has_its_input_its_folder_and_children(isolated):
    program = (
        "import subprocess\nopen('/tmp/a', 'w').write(input())\n"
        "print(subprocess.run(['cat', '/tmp/a'], capture_output=True, text=True).stdout)"
    )
    assert sandbox.run(program, stdin="é ∀\n").stdout == "é ∀\n"
    assert sandbox.run("import sys; print(len(sys.stdin.buffer.read()))", stdin="\ud800").stdout == "3\n"


@pytest.mark.parametrize(
    "program, most",
    [
        ("import os, time\ndef use():\n    if os.fork() == 0: time.sleep(100)", 8),
        ("kept = []\ndef use(): kept.append(bytearray(8 << 20))", 32),
        ("count = 0\ndef use(): open(f'/tmp/{count}', 'wb').write(bytes(1 << 20))", 16),
        ("kept = []\ndef use(): kept.append(open('/dev/null'))", 64),
    ],
    ids=["processes", "memory", "files", "open files"],
)
def test_limits_hold(isolated, program, most):
    """As often as it can, and below 100 times."""
    count = "count = 0\ntry:\n    while count < 100:\n        use()\n        count += 1\nexcept Exception: pass\nprint(count, flush=True)\n"
    ran = sandbox.run(f"{program}\n{count}import os; os._exit(0)")
    assert most // 2 < int(ran.stdout) <= most


def test_its_processor_time_ends_a_program_that_no_clock_watches(isolated):
    jail = start("while True: pass", seconds=0.5)
    try:
        jail.process.wait(timeout=30)
        assert json.loads(os.read(jail.status, 1000).splitlines()[-1]) == {"exit": -signal.SIGKILL}
    finally:
        jail.close()


def test_how_a_program_ended(isolated):
    limits = sandbox.Limits(seconds=0.5, output_bytes=10)
    assert sandbox.run("print(1); raise SystemExit(3)") == ("1\n", "", 3, "exit")
    assert sandbox.run("import os; os.kill(os.getpid(), 9)").exit_code == -9
    assert sandbox.run("while True: pass", limits=limits)[2:] == (None, "time")
    assert sandbox.run("print('x' * 100)", limits=limits)[2:] == (None, "output")


def test_a_launcher_that_is_killed_takes_all_with_it(isolated):
    jail = start(f"import os\nos.fork()\nos.execv('/bin/sleep', ['killed-{TOKEN}', '1000'])")
    try:
        wait_until(lambda: len(marked(f"killed-{TOKEN}")) == 2)
        jail.process.kill()
        wait_until(lambda: not marked())
    finally:
        jail.close()


def start(program, seconds=60.0):
    argv = [sandbox.PYTHON, "-I", "/program/main.py"]
    return sandbox.start(argv, files={"main.py": program}, stdin="", limits=sandbox.Limits(seconds=seconds), readable=())


def wait_until(true, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_threads_may_run_programs(isolated):
    found = []
    threads = [threading.Thread(target=lambda n=n: found.append(sandbox.run(f"print({n})").stdout)) for n in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(found) == ["0\n", "1\n", "2\n", "3\n"]


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in launcher.ARCHITECTURES, reason="refused before the kernel is asked"
)
def test_where_the_kernel_gives_no_namespace_nothing_is_run():
    """A process that may not call `unshare` any more: the filter of the jail itself, put around the outside."""
    program = """if True:
        import platform, sys, types
        package = types.ModuleType("ftjax.rewards")  # without its __init__, which would take a second to import JAX
        package.__path__ = ["ftjax/rewards"]
        sys.modules["ftjax.rewards"] = package
        from ftjax.rewards import code, launcher, sandbox
        launcher.prctl(launcher.NO_NEW_PRIVS, 1)
        launcher.filter_calls(launcher.ARCHITECTURES[platform.machine()])
        try:
            print(code.code([""], ["```\\nprint(5)\\n```"], tests=[[{"input": "", "output": "5"}]]))
        except sandbox.NoIsolation as error:
            print(error)
    """
    root = pathlib.Path(__file__).parents[2]
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root, timeout=60, check=True)
    assert ran.stdout.startswith("sandbox: this machine does not isolate processes (unshare: Operation not permitted), so untrusted")


@pytest.mark.parametrize(
    "system, machine, why", [("darwin", "arm64", "darwin is not Linux"), ("linux", "riscv64", "no list of system calls for riscv64")]
)
def test_other_systems_are_refused(monkeypatch, system, machine, why):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert why in sandbox.isolation.__wrapped__()
