"""Runs inside a fresh process: build the cage, then run one untrusted program in it. Started by sandbox.py alone.

Three processes. This one enters the namespaces and waits outside the cage. Its child is process 1 in there: it puts
together a root that holds the interpreter (read-only) and an empty folder of its own in memory, starts the program and
reports how it ended, with a nonce the program never sees. The grandchild gives up all rights and becomes the program.
When process 1 ends, for whatever reason, the kernel ends every process in the namespace.
"""

from __future__ import annotations

import ctypes
import marshal
import os
import sys

from infir2.reward import confine

TYPE_CHECKING = False  # typing, enum, re, json: modules that would double the time a start takes
if TYPE_CHECKING:
    from typing import Any, NoReturn

WORK = "/work"
_SIGINT, _SIGKILL = 2, 9
NOBODY = 65534
_NEW_NAMESPACES = 0x10000000 | 0x40000000 | 0x20000000 | 0x08000000 | 0x04000000 | 0x20000  # user net pid ipc uts mount
_MS_NOSUID, _MS_NODEV, _MS_REMOUNT, _MS_RDONLY, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 32, 1, 4096, 16384, 1 << 18
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_MOUNT_SETATTR, _AT_RECURSIVE, _READ_ONLY_NO_SETUID = 442, 0x8000, 0b11
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}


def main() -> NoReturn:
    """Descriptors in argv: the job (marshal, from the same interpreter), where to report, where results go."""
    control, status, results = map(int, sys.argv[1:4])
    with os.fdopen(control, "rb") as file:
        job = marshal.load(file)
    os.umask(0o022)  # the program, another user, has to enter the folders made for it
    confine.libc.signal(_SIGINT, ctypes.c_void_p(0))  # the default, which process 1 ignores
    confine.libc.alarm(ctypes.c_uint(int(job["limits"]["wall_s"]) + 5))  # should nobody stop us
    for descriptor in (status, results):
        os.set_inheritable(descriptor, False)
    report = Reporter(status, job["nonce"])
    try:
        if "namespaces" in job["layers"]:
            enter_namespaces(job["parent"])
            alive, held = os.pipe()
            child = os.fork()
            if child == 0:
                os.close(held)
                as_process_one(job, report, results, alive)
        else:
            die_with(job["parent"])
            child = start_program(job, report, results, job["work"])
            report("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            os._exit(0)
    except BaseException as error:
        report.failure(error)
    os.close(status)
    os.close(results)
    os.waitpid(child, 0)
    os._exit(0)


class Reporter:
    """Writes lines that begin with the nonce; the parent believes no others."""

    def __init__(self, descriptor: int, nonce: str) -> None:
        self.descriptor, self.nonce = descriptor, nonce

    def __call__(self, word: str, detail: object) -> None:
        os.write(self.descriptor, f"{self.nonce} {word} {detail}\n".encode()[:4000])

    def failure(self, error: BaseException) -> NoReturn:
        self("broken", f"{type(error).__name__}: {error}".replace("\n", " "))
        os._exit(70)


def enter_namespaces(parent: int) -> None:
    """New user, network, process, IPC, host name and mount namespaces. Root of the machine gets the user *nobody* to
    run programs as, since the limit on processes does not bind root; another user is known as nobody inside."""
    uid, gid = os.geteuid(), os.getegid()
    wait, go = os.pipe()
    helper = 0
    if uid == 0:  # two identities can only be mapped from outside
        helper = os.fork()
        if helper == 0:
            os.close(go)
            os.read(wait, 1)
            _map_identities(os.getppid(), f"0 0 1\n{NOBODY} {NOBODY} 1", f"0 0 1\n{NOBODY} {NOBODY} 1")
    _checked(confine.libc.unshare(_NEW_NAMESPACES), "new namespaces")
    os.close(go)
    os.close(wait)
    if not helper or os.waitpid(helper, 0)[1] != 0:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{NOBODY} {uid} 1")
        _write("/proc/self/gid_map", f"{NOBODY} {gid} 1")
    die_with(parent)


def _map_identities(process: int, users: str, groups: str) -> NoReturn:
    try:
        _write(f"/proc/{process}/uid_map", users)
        _write(f"/proc/{process}/gid_map", groups)
    except OSError:
        os._exit(1)
    os._exit(0)


def die_with(parent: int | None) -> None:
    """Be killed when the parent ends, and in any case if it has ended already."""
    confine.libc.prctl(1, ctypes.c_ulong(_SIGKILL), *[ctypes.c_ulong(0)] * 3)
    if parent is not None and os.getppid() != parent:
        os._exit(71)


def as_process_one(job: dict[str, Any], report: Reporter, results: int, alive: int) -> NoReturn:
    """Build the root, run the program, report its end and end with it."""
    try:
        die_with(None)
        os.set_blocking(alive, False)
        try:
            os.read(alive, 1)
            os._exit(72)  # end of file: our parent died before we could ask to die with it
        except BlockingIOError:
            os.close(alive)
        build_root(job["readable"], job["limits"]["folder_mib"])
        child = start_program(job, report, results, WORK)
        os.close(results)
        while True:  # orphans of the program are ours
            ended, outcome = os.waitpid(-1, 0)
            if ended == child:
                break
        report("ended", os.waitstatus_to_exitcode(outcome))
        os._exit(0)
    except BaseException as error:
        report.failure(error)


def build_root(readable: list[str], folder_mib: int) -> None:
    """A new root in memory: ``readable`` bound at their own places read-only, four devices, and /work to write in."""
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=0755")
    os.mkdir("/tmp/.old")
    machine = os.uname().machine
    _checked(confine.libc.syscall(_PIVOT_ROOT[machine], b"/tmp", b"/tmp/.old"), "pivot_root")
    os.chdir("/")
    for path in readable:
        _bind(path, read_only=True)
    for path in _DEVICES:
        _bind(path, read_only=False)
    os.mkdir(WORK)
    _checked(confine.libc.umount2(b"/.old", 2), "leaving the old root")
    os.rmdir("/.old")
    _mount("tmpfs", WORK, "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={folder_mib}m,nr_inodes=4096,mode=0777")
    _mount(None, "/", None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)
    confine.libc.sethostname(b"sandbox", 7)


def _bind(path: str, read_only: bool) -> None:
    source = "/.old" + path
    if os.path.lexists(path) or not os.path.lexists(source):
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.islink(source):
        os.symlink(os.readlink(source), path)
        return
    if os.path.isdir(source):
        os.mkdir(path)
    else:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    _mount(source, path, None, _MS_BIND | _MS_REC)
    if read_only:
        attributes = (ctypes.c_uint64 * 4)(_READ_ONLY_NO_SETUID, 0, 0, 0)
        arguments = ctypes.c_int(-100), path.encode(), ctypes.c_uint(_AT_RECURSIVE), attributes, ctypes.c_size_t(32)
        _checked(confine.libc.syscall(_MOUNT_SETATTR, *arguments), f"making {path} read-only")


def start_program(job: dict[str, Any], report: Reporter, results: int, work: str) -> int:
    """Fork; the child gives up its rights in the order in which it still may, and becomes the program."""
    child = os.fork()
    if child:
        return child
    try:
        os.chdir(work)
        limits, layers = job["limits"], job["layers"]
        with open("program.py", "w", encoding="utf-8") as file:
            file.write(job["source"])
        confine.limit_resources(
            cpu_s=limits["cpu_s"], memory_mib=limits["memory_mib"], file_mib=limits["file_mib"], files=limits["files"]
        )
        if "namespaces" in layers:
            if os.geteuid() == 0:
                _become_nobody()
            # counted in this namespace (without one, all the user's own would count); the launcher's three may be in it
            confine.limit_resources(processes=limits["processes"] + 3)
            os.setsid()  # a group of its own: kill(0, ...) must not reach the launcher outside
        confine.no_new_privileges()
        if "landlock" in layers:
            confine.restrict_files(job["readable"], [work, *_DEVICES])
        if "seccomp" in layers:
            confine.refuse_system_calls()
        os.set_inheritable(results, True)
        die_with(None)
        environment = {**ENVIRONMENT, "HOME": work, "TMPDIR": work}
        os.execve(job["python"], [job["python"], *job["arguments"], str(results)], environment)
    except BaseException as error:
        report.failure(error)


def _become_nobody() -> None:
    """From root in the namespace to nobody: every capability goes with it."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    names = [text.encode() if text is not None else None for text in (source, target, kind)]
    _checked(confine.libc.mount(*names, ctypes.c_ulong(flags), options.encode()), f"mount on {target}")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result
