"""The inside of `sandbox`: a script that builds a jail out of Linux namespaces, puts one program into it and reports how it ended.

Run by path as `python -I -S launcher.py SPEC_FD STATUS_FD`, never imported by a process that matters: it changes whoever runs it.

    outer   in the host's namespaces; writes which user the inside is
      middle   unshares user, mount, pid, network, ipc, uts and cgroup namespaces
        init   process 1 of the new pid namespace: builds the jail's root, gives up every right, waits; when it ends, the kernel ends all
          program   in a session of its own, with limits and a filter on system calls

SIGTERM to outer ends init and with it everything, each process reaped by its parent. What a program sees: `/usr` and the interpreter, read
only, a `/tmp` of its own, four devices. No `/proc`, no other process, no socket, no other file.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import resource
import signal
import struct
import sys
from typing import Any, NoReturn

NOBODY = 65534
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/nix/store")
DEVICES = ("null", "zero", "random", "urandom")

# linux/sched.h: new mount, cgroup, uts, ipc, user, pid and network namespaces.
NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
NOSUID, NODEV, BIND, RECURSIVE, PRIVATE = 2, 4, 4096, 16384, 1 << 18
DETACH = 2
PDEATHSIG, DUMPABLE, SECCOMP, CAPBSET_DROP, NO_NEW_PRIVS = 1, 4, 22, 24, 38

# Of each architecture: its name in seccomp, the calls by number that are refused, and four that are treated apart.
DENIED = (
    "ptrace process_vm_readv process_vm_writev socket shmget msgget semget memfd_create unshare setns mount umount2 pivot_root chroot "
    "keyctl add_key request_key bpf perf_event_open userfaultfd syslog mount_setattr memfd_secret io_uring_setup io_uring_enter "
    "io_uring_register open_tree move_mount fsopen fsconfig fsmount fspick"
).split()
_NEWER = (442, 447, 425, 426, 427, 428, 429, 430, 431, 432, 433)  # numbered alike everywhere
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "x86_64": {
        "audit": 0xC000003E,
        "denied": (101, 310, 311, 41, 29, 68, 64, 319, 272, 308, 165, 166, 155, 161, 250, 248, 249, 321, 298, 323, 103, *_NEWER),
        "clone": 56,
        "clone3": 435,
        "socketpair": 53,
        "pivot_root": 155,
    },
    "aarch64": {
        "audit": 0xC00000B7,
        "denied": (117, 270, 271, 198, 194, 186, 190, 279, 97, 268, 40, 39, 41, 51, 219, 217, 218, 280, 241, 282, 116, *_NEWER),
        "clone": 220,
        "clone3": 435,
        "socketpair": 199,
        "pivot_root": 41,
    },
}


class JailError(Exception):
    """What the kernel refused."""


def main(spec_fd: int, status_fd: int) -> NoReturn:
    """Run what the spec says; the lines of the status are JSON: `{"error": …}`, `{"started": true}`, `{"exit": code or -signal}`."""
    with os.fdopen(spec_fd) as file:
        spec = json.load(file)
    os.set_inheritable(status_fd, False)

    def report(**fields: Any) -> None:
        os.write(status_fd, json.dumps(fields).encode() + b"\n")

    try:
        outer(spec, report)
    except (JailError, OSError, KeyError) as error:  # of whichever process it happens in
        report(error=f"{error}" if isinstance(error, JailError) else f"{type(error).__name__}: {error}")
    os._exit(1)


def outer(spec: dict[str, Any], report: Any) -> NoReturn:
    if spec["leash"]:
        prctl(PDEATHSIG, signal.SIGKILL)
    root = os.geteuid() == 0
    if root:
        os.setgroups([])
    unshared, mapped = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        prctl(PDEATHSIG, signal.SIGKILL)
        _call("unshare", NAMESPACES)
        os.write(unshared[1], b".")
        os.close(mapped[1])
        if os.read(mapped[0], 1):
            middle(spec, report)
        os._exit(1)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
    os.close(unshared[1])
    if os.read(unshared[0], 1):
        _map_users(child, root)
        os.write(mapped[1], b".")
    os.waitpid(child, 0)
    os._exit(0)


def middle(spec: dict[str, Any], report: Any) -> NoReturn:
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        init(spec, report)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
    os.waitpid(child, 0)
    os._exit(0)


def init(spec: dict[str, Any], report: Any) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # process 1 does not feel signals that it has no handler for
    prctl(PDEATHSIG, signal.SIGKILL)
    _build_root(spec)
    _give_up_rights()
    prctl(PDEATHSIG, signal.SIGKILL)  # a change of user forgets it
    program = os.fork()
    if program == 0:
        _become(spec, report)
    while True:
        pid, status = os.wait()  # orphans end here too
        if pid == program:
            report(exit=os.waitstatus_to_exitcode(status))
            os._exit(0)


def _map_users(child: int, root: bool) -> None:
    """Say who the inside is. Root becomes nobody for good, since no limit on processes holds for root; others stay who they are."""
    if not root:
        _write(f"/proc/{child}/setgroups", "deny")
    for kind, own in (("uid", os.geteuid()), ("gid", os.getegid())):
        _write(f"/proc/{child}/{kind}_map", f"0 0 1\n{NOBODY} {NOBODY} 1" if root else f"{NOBODY} {own} 1")


def _build_root(spec: dict[str, Any]) -> None:
    """Leave the host's files for a tree of read-only binds; afterwards nothing of the old one can be named."""
    _mount(None, "/", None, RECURSIVE | PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", NOSUID | NODEV, "mode=755")
    os.mkdir("/tmp/old")
    os.mkdir("/tmp/new")
    os.chdir("/tmp")
    _pivot(".", "old")
    os.chdir("/")
    _mount("tmpfs", "/new", "tmpfs", NOSUID | NODEV, "mode=755")
    for folder in ("tmp", "dev", "program"):
        os.mkdir(f"/new/{folder}")
    _mount("tmpfs", "/new/tmp", "tmpfs", NOSUID | NODEV, f"mode=1777,nr_inodes=1024,size={spec['limits']['file_bytes']}")
    for path in (*SYSTEM, *spec["readable"]):
        _bind(path)
    for name, text in spec["files"].items():
        _write(f"/new/program/{name}", text)
    devices = [name for name in DEVICES if os.path.exists(f"/old/dev/{name}")]
    for name in devices:
        _write(f"/new/dev/{name}", "")
    # struct mount_attr: read-only, nosuid and nodev (1, 2, 4) for the whole tree (AT_RECURSIVE), but /tmp may be written. Linux 5.12.
    _call("syscall", 442, -100, b"/new", 0x8000, struct.pack("QQQQ", 7, 0, 0, 0), 32, what="mount_setattr")
    _call("syscall", 442, -100, b"/new/tmp", 0, struct.pack("QQQQ", 0, 1, 0, 0), 32, what="mount_setattr")
    for name in devices:
        _mount(f"/old/dev/{name}", f"/new/dev/{name}", None, BIND)
    _call("umount2", b"/old", DETACH)
    os.chdir("/new")
    _pivot(".", ".")
    _call("umount2", b".", DETACH)
    os.chdir("/tmp")


def _bind(path: str) -> None:
    source, target = f"/old{path}", f"/new{path}"
    if os.path.lexists(target):  # beneath a path that is there
        return
    if os.path.islink(source):
        os.symlink(os.readlink(source), target)
    elif os.path.isdir(source):
        os.makedirs(target)
        _mount(source, target, None, BIND | RECURSIVE)
    elif os.path.exists(source):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        _write(target, "")
        _mount(source, target, None, BIND)


def _give_up_rights() -> None:
    for capability in range(64):
        if _LIBC.prctl(CAPBSET_DROP, capability, 0, 0, 0) and ctypes.get_errno() == errno.EINVAL:
            break  # the last one there is
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    _call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))
    prctl(NO_NEW_PRIVS, 1)
    prctl(DUMPABLE, 0)  # and no program may look into its init


def _become(spec: dict[str, Any], report: Any) -> NoReturn:
    """Turn into the program."""
    os.setsid()
    if spec["stdin"] is not None:
        os.dup2(os.open("/program/stdin", os.O_RDONLY), 0)
    limits = spec["limits"]
    for name, value in {
        "CPU": limits["cpu_seconds"],
        "AS": limits["memory_bytes"],
        "FSIZE": limits["file_bytes"],
        "NPROC": limits["processes"] + 2,  # init, and outside of root's runs middle
        "NOFILE": 64,
        "CORE": 0,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
    }.items():
        kind = getattr(resource, f"RLIMIT_{name}", 12)  # Python has no name for MSGQUEUE, which is 12
        most = resource.getrlimit(kind)[1]
        bound = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(kind, (bound, bound))
    filter_calls(ARCHITECTURES[platform.machine()])
    report(started=True)
    try:
        os.execve(spec["argv"][0], spec["argv"], spec["environment"])
    except OSError as error:
        report(error=f"cannot run {spec['argv'][0]}: {error}")
    os._exit(127)


def filter_calls(numbers: dict[str, Any]) -> None:
    """Refuse system calls that reach around the other walls: sockets of any family, shared memory, new namespaces, tracing."""
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse, unknown = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
    code = [(load, 0, 0, 4), (equal, 1, 0, numbers["audit"]), (answer, 0, 0, kill), (load, 0, 0, 0)]
    code += [(at_least, 0, 1, 0x40000000), (answer, 0, 0, kill)]  # the other ABI of x86
    for number in numbers["denied"]:
        code += [(equal, 0, 1, number), (answer, 0, 0, refuse)]
    code += [(equal, 0, 1, numbers["clone3"]), (answer, 0, 0, unknown)]  # its flags stand in memory; libc falls back to clone
    code += [(equal, 0, 4, numbers["clone"]), (load, 0, 0, 16), (any_bit, 0, 1, NAMESPACES), (answer, 0, 0, refuse), (answer, 0, 0, allow)]
    code += [(equal, 0, 4, numbers["socketpair"]), (load, 0, 0, 16), (equal, 1, 0, 1), (answer, 0, 0, refuse), (answer, 0, 0, allow)]
    code += [(answer, 0, 0, allow)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    prctl(SECCOMP, 2, struct.pack("HP", len(code), ctypes.addressof(program)))


_LIBC = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: Any, what: str = "") -> None:
    wide = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    if getattr(_LIBC, name)(*wide) != 0:
        raise JailError(f"{what or name}: {os.strerror(ctypes.get_errno())}")


def prctl(option: int, *arguments: Any) -> None:
    _call("prctl", option, *arguments, *[0] * (4 - len(arguments)), what=f"prctl {option}")


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind)]
    _call("mount", *texts, flags, options.encode(), what=f"mount {target}")


def _pivot(new: str, old: str) -> None:
    _call("syscall", ARCHITECTURES[platform.machine()]["pivot_root"], new.encode(), old.encode(), what="pivot_root")


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8", errors="surrogatepass") as file:
        file.write(text)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
