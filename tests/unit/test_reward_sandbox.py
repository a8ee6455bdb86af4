"""The sandbox against real attacks. Every test asserts what the attack achieved, never an exit code.

Attacks aim at canaries of the test and are small, so that a sandbox that fails does no harm to the machine.
"""

import contextlib
import os
import secrets
import select
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from infir2.reward import sandbox as module
from infir2.reward.code import CodeTests, StdioCase, judge
from infir2.reward.cores import usable_cores
from infir2.reward.sandbox import Limits, Sandbox, SandboxError, launch, sandbox_report
from infir2.reward.workers import WorkerPool

ROOT = Path(__file__).parents[2]


def attempts(*lines: str, **names: object) -> str:
    """A program that tries each line for itself and prints what came of it. Paths are given to it as strings."""
    program = "import os, sys, socket, ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    for name, value in names.items():
        program += f"{name} = {(str(value) if isinstance(value, Path) else value)!r}\n"
    for line in lines:
        program += f"try:\n    print('GOT', {line})\nexcept BaseException as error:\n    print('REFUSED', error)\n"
    return program


def processes_with(mark: str) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if mark.encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
    return found


def gone(mark: str) -> bool:
    """Whether no process with this mark is left, within two seconds."""
    deadline = time.monotonic() + 2
    while processes_with(mark):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


# what is allowed ------------------------------------------------------------------------------------------------------
def test_a_program_reads_computes_and_prints(sandbox: Sandbox) -> None:
    run = sandbox.run_script("a, b = map(int, input().split())\nprint(a * b)\nexit()", b"6 7\n")
    assert (run.status, run.stdout) == ("exited", b"42\n")
    source = "import math, json, heapq, decimal, dataclasses, threading, tempfile, datetime\nprint(math.comb(60, 30))"
    assert sandbox.run_script(source).stdout == b"118264581564861424\n"


def test_a_program_may_use_its_folder_and_threads(sandbox: Sandbox) -> None:
    run = sandbox.run_script(
        "import tempfile, threading\nopen('notes', 'w').write('mine')\nt = threading.Thread(target=print, "
        "args=(open('notes').read(),))\nt.start(); t.join()\nprint(tempfile.TemporaryFile().write(b'abc'))"
    )
    assert run.stdout == b"mine\n3\n", run


def test_every_run_starts_with_nothing(sandbox: Sandbox) -> None:
    sandbox.run_script("open('left', 'w').write('behind')")
    assert b"left" not in sandbox.run_script("import os; print(os.listdir('.'))").stdout


def test_every_run_hashes_alike(sandbox: Sandbox) -> None:
    """The order of a set of strings is the same in every run, and with it the verdict."""
    source = "print(hash('a'), {'one', 'two', 'three', 'four', 'five'})"
    assert sandbox.run_script(source).stdout == sandbox.run_script(source).stdout


def test_a_private_umask_does_not_matter(sandbox: Sandbox) -> None:
    before = os.umask(0o077)
    try:
        assert sandbox.run_script("print(1)").stdout == b"1\n"
    finally:
        os.umask(before)


def test_functions_are_called(sandbox: Sandbox) -> None:
    source = "class Solution:\n    def add(self, a: List[int], b):\n        print('noise')\n        return sum(a) + b"
    run = sandbox.run_calls(source, "add", [[[1, 2], 3], [[], 1]])
    assert run.results == b"6\n1\n"
    assert run.stdout == b"noise\n" * 2


def test_eight_at_once_and_how_long_one_takes(sandbox: Sandbox) -> None:
    began = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda n: sandbox.run_script(f"print({n} ** 2)"), range(32)))
    assert [int(run.stdout) for run in runs] == [n**2 for n in range(32)]
    assert time.monotonic() - began < 15


# attacks --------------------------------------------------------------------------------------------------------------
def test_no_network(sandbox: Sandbox) -> None:
    with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        udp.bind(("127.0.0.1", 0))
        run = sandbox.run_script(
            attempts(
                "socket.create_connection(('127.0.0.1', tcp), 2)",
                "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', udp))",
                "socket.socket(40, socket.SOCK_STREAM)",  # vsock: the way from a virtual machine to its host
                "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
                tcp=tcp.getsockname()[1],
                udp=udp.getsockname()[1],
            )
        )
        assert select.select([tcp, udp], [], [], 0.2)[0] == []
    assert run.stdout.count(b"REFUSED") == 4, run


def test_no_pairs_of_other_families(sandbox: Sandbox) -> None:
    """The kernel makes both sockets of a pair before it finds that the family has none: a way to all of its code."""
    run = sandbox.run_script(
        "import ctypes\nlibc, pair = ctypes.CDLL(None, use_errno=True), (ctypes.c_int * 2)()\n"
        "for family in (2, 10, 16, 40):\n    libc.socketpair(family, 2, 0, pair)\n    print(ctypes.get_errno())\n"
        "import socket\nprint(len(socket.socketpair()))"
    )
    assert run.stdout.split() == [b"1"] * 4 + [b"2"], run  # EPERM


def test_no_abstract_or_named_sockets_of_others(sandbox: Sandbox, tmp_path: Path, canary: Path) -> None:
    name = "\0infir2-test-" + secrets.token_hex(8)
    with socket.socket(socket.AF_UNIX) as abstract, socket.socket(socket.AF_UNIX) as named:
        abstract.bind(name)
        abstract.listen()
        named.bind(str(tmp_path / "s"))
        named.listen()
        (tmp_path / "s").chmod(0o777)
        lines = (f"socket.socket(socket.AF_UNIX).connect({where!r})" for where in (name, str(tmp_path / "s")))
        run = sandbox.run_script(attempts(*lines))
        assert select.select([abstract, named], [], [], 0.2)[0] == []
    assert run.stdout.count(b"REFUSED") == 2, run


def test_no_reading_outside(sandbox: Sandbox, canary: Path) -> None:
    places = (str(canary), "/etc/passwd", "/etc/hostname", "/proc/1/environ", "/proc/self/environ", "/proc/self/maps")
    run = sandbox.run_script(
        attempts(
            *(f"open({place!r}).read()" for place in places),
            *(f"os.listdir({place!r})" for place in ("/", "/root", "/home", "/proc", "/tmp", str(canary.parent))),
            "os.stat(canary)",
            canary=canary,
        )
    )
    assert b"GOT" not in run.stdout, run
    assert run.stdout.count(b"REFUSED") == 13


def test_no_writing_or_changing_outside(sandbox: Sandbox, canary: Path) -> None:
    before = canary.stat()
    run = sandbox.run_script(
        attempts(
            "open(canary, 'w').write('gone')", "open(canary + '2', 'w').write('new')", "os.chmod(canary, 0)",
            "os.utime(canary)", "os.remove(canary)", "os.truncate(canary, 0)", "os.rename(canary, canary + '3')",
            *(f"[open({f!r}, 'w'), os.remove({f!r})]" for f in ("/tmp/infir2-x", "/infir2-x", "/usr/infir2-x")),
            "open(os.__file__, 'a')", "os.chmod(sys.executable, 0o755)", "os.utime(os.__file__)",
            "[os.mkdir('/infir2-y'), os.rmdir('/infir2-y')]",
            canary=canary,
        )
    )  # fmt: skip
    assert canary.read_text() == "canary-sings"
    assert (before.st_mode, before.st_mtime_ns) == (canary.stat().st_mode, canary.stat().st_mtime_ns)
    assert os.listdir(canary.parent) == ["canary"]
    assert b"GOT" not in run.stdout, run


def test_no_secrets_from_the_environment(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = secrets.token_hex(16)
    monkeypatch.setenv("API_TOKEN", secret)
    run = sandbox.run_script(
        "import os, sys, ctypes\nprint(dict(os.environ), sys.argv, sys.orig_argv)\n"
        "environ = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), 'environ')\n"
        "i = 0\nwhile environ[i]:\n    print(environ[i]); i += 1"
    )
    assert b"HOME" in run.stdout
    assert secret.encode() not in run.stdout


def test_a_fork_bomb_stays_small_and_dies(sandbox: Sandbox) -> None:
    mark = "mark" + secrets.token_hex(8)
    run = sandbox.run_script(
        "import os, sys\nmade = 0\nfor _ in range(60):\n    try:\n        if os.fork() == 0:\n            os.setsid()\n"
        f"            os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(30)  # {mark}'])\n"
        "        made += 1\n    except OSError:\n        break\nprint(made)"
    )
    assert 1 <= int(run.stdout) <= sandbox.limits.processes + 3
    assert gone(mark)


def test_no_orphan_survives(sandbox: Sandbox) -> None:
    mark = "mark" + secrets.token_hex(8)
    run = sandbox.run_script(
        "import os, sys, signal\nfor s in (1, 2, 15): signal.signal(s, signal.SIG_IGN)\n"
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork():\n        os._exit(0)\n"
        f"    os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(30)  # {mark}'])\n"
        "import time; time.sleep(0.3); print('left')"
    )
    assert run.stdout == b"left\n"
    assert run.wall_s < 10
    assert gone(mark)


def test_endless_programs_are_stopped(sandbox: Sandbox) -> None:
    mark = "mark" + secrets.token_hex(8)
    short = Sandbox(Limits(wall_s=1.0, cpu_s=5, processes=8))
    loop = f"import os, sys\nos.execv(sys.executable, [sys.executable, '-c', 'while True: pass  # {mark}'])"
    began = time.monotonic()
    run = short.run_script(loop)
    assert run.status == "timeout"
    assert time.monotonic() - began < 5
    assert gone(mark)
    idle = Sandbox(Limits(wall_s=10, cpu_s=1)).run_script("while True: pass")
    assert idle.status == "timeout"  # the CPU limit, well before the wall
    assert idle.wall_s < 9


def test_memory_is_bounded(sandbox: Sandbox) -> None:
    run = sandbox.run_script(
        attempts(
            "len(bytearray(400 << 20))",
            "len(__import__('mmap').mmap(-1, 400 << 20))",
            "libc.shmget(0, 64 << 20, 0o1777) if libc.shmget(0, 64 << 20, 0o1777) >= 0 else 1 / 0",
            "os.memfd_create('x')",
        )
    )
    assert b"GOT" not in run.stdout, run
    assert run.stdout.count(b"REFUSED") == 4


def test_output_is_bounded(sandbox: Sandbox) -> None:
    run = sandbox.run_script("import sys\nfor _ in range(60):\n    sys.stdout.write('x' * 1_000_000)")
    assert run.status == "output"
    assert len(run.stdout) == sandbox.limits.output_kib << 10
    run = sandbox.run_script("import sys\nfor _ in range(20): sys.stderr.write('x' * 1_000_000)\nprint('ok')")
    assert run.stdout == b"ok\n"
    assert len(run.stderr) == 16_384


def test_files_are_bounded_and_leave_nothing_on_disk(sandbox: Sandbox) -> None:
    run = sandbox.run_script(
        "import os\ntotal = 0\nfor n in range(20):\n    try:\n        with open(f'f{n}', 'wb', 0) as f:\n"
        "            for _ in range(20): total += f.write(b'x' * (1 << 20))\n    except OSError: pass\n"
        "print(total, max(os.path.getsize(f) for f in os.listdir('.')))"
    )
    total, largest = map(int, run.stdout.split())
    assert 0 < largest <= sandbox.limits.file_mib << 20
    assert total <= sandbox.limits.folder_mib << 20


def test_nobody_outside_can_be_killed(sandbox: Sandbox) -> None:
    child = subprocess.Popen(["sleep", "30"])
    try:
        run = sandbox.run_script(
            "import os\ncaged = os.getpid() == 2  # else this would be a massacre\n"
            f"for pid in ({child.pid}, *([1, {os.getpid()}, -1] if caged else [])):\n"
            "    try: os.kill(pid, 9)\n    except OSError: pass\nprint(caged)"
        )
        assert child.poll() is None
        assert run.stdout == b"True\n"
        assert sandbox.run_script("print(1)").stdout == b"1\n"
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize("layers", [("namespaces",), ("namespaces", "seccomp"), module.LAYERS])
def test_the_program_is_alone_in_its_group(sandbox: Sandbox, layers: tuple[str, ...]) -> None:
    """So kill(0, 9) reaches nobody outside, even where neither users nor Landlock keep them apart."""
    run = launch("import os\nprint(os.getpgrp(), os.getsid(0))", b"", ("script", "-"), sandbox.limits, layers)
    assert run.stdout == b"2 2\n", "0 would be a group from outside"
    run = launch("import os\nprint(1, flush=True)\nos.kill(0, 9)", b"", ("script", "-"), sandbox.limits, layers)
    assert (run.status, run.code, run.stdout) == ("signal", -9, b"1\n")


def kill_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is launched from now on loses its outermost process after half a second."""

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        process = real(*arguments, **options)
        threading.Timer(0.5, process.kill).start()
        return process

    real = subprocess.Popen
    monkeypatch.setattr(module.subprocess, "Popen", start)


def test_a_cage_that_is_killed_is_a_failed_program_once_the_sandbox_is_proved(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleep = "import time; time.sleep(15)"
    with monkeypatch.context() as patch:
        kill_launchers(patch)
        run = sandbox.run_script(sleep)
        assert (run.status, run.code) == ("signal", -9)
        assert judge(sleep, CodeTests((StdioCase("2\n", "4\n"),)), sandbox).outcome == "error"
        with pytest.raises(SandboxError, match="without a word"):
            launch(sleep, b"", ("script", "-"), sandbox.limits, module.LAYERS)
    monkeypatch.setattr(module, "_LAUNCH", "raise OSError('no such module')  # {root}")
    with pytest.raises(SandboxError, match=r"without a word: OSError: no such module$"):
        sandbox.run_script("print(1)")


def test_no_more_programs_at_once_than_cores(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    assert module._ROOM._initial_value == usable_cores()  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "_ROOM", threading.BoundedSemaphore(2))
    source = "import time\nprint(time.monotonic())\ntime.sleep(0.3)\nprint(time.monotonic())"
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: sandbox.run_script(source), range(8)))
    spans = [tuple(map(float, run.stdout.split())) for run in runs]
    assert max(sum(start <= moment < end for start, end in spans) for moment, _ in spans) <= 2


def test_cores_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    for told, cores in (("max 100000", 6), ("250000 100000", 2), ("50000 100000", 1), ("900000 100000", 6)):
        monkeypatch.setattr(Path, "read_text", lambda path, told=told: told)
        assert usable_cores() == cores
        assert WorkerPool("sleep", 1.0).count == max(1, cores - 1)


def test_links_lead_nowhere(sandbox: Sandbox, canary: Path) -> None:
    run = sandbox.run_script(
        attempts(
            "[os.symlink(canary, 'link'), open('link').read()]", "open('link', 'w').write('gone')",
            "os.chmod('link', 0)", "os.link(canary, 'hard')", "os.link(os.__file__, 'hard2')",
            "open('../' + canary).read()", "[os.symlink('/', 'up'), os.listdir('up/root')]",
            "open('/proc/self/root' + canary).read()", "os.chroot('.')", "[os.mkdir('d'), os.chroot('d')]",
            "os.mknod('disk', 0o60666, os.makedev(8, 0))",
            canary=canary,
        )
    )  # fmt: skip
    assert b"GOT" not in run.stdout, run
    assert canary.read_text() == "canary-sings"


def test_no_privileges_to_gain(sandbox: Sandbox) -> None:
    run = sandbox.run_script(
        attempts(
            "os.setuid(0)", "os.setgroups([0])", "1 / (libc.unshare(0x10000000) == 0)",
            "1 / (libc.mount(b'x', b'/work', b'tmpfs', 0, None) == 0)", "1 / (libc.ptrace(16, 1, 0, 0) == 0)",
            "1 / (libc.syscall(435, 0, 0) > 0)", "os.nice(-5)",
        )
    )  # fmt: skip
    assert b"GOT" not in run.stdout, run
    status = sandbox.run_script("import os; print(os.getresuid(), os.getgroups())")
    assert b"(65534, 65534, 65534)" in status.stdout


def test_no_descriptor_of_ours_is_open_inside(sandbox: Sandbox, canary: Path) -> None:
    with canary.open() as file:
        os.set_inheritable(file.fileno(), True)
        run = sandbox.run_script(
            "import os\nfor fd in range(3, 64):\n    try: print(fd, os.fstat(fd))\n    except OSError: pass"
        )
    assert run.stdout == b"", run


# fails closed ---------------------------------------------------------------------------------------------------------
CRIPPLED = """
import errno, logging, os, sys
from infir2.reward import confine
# Refuse just this system call, as a machine would that lacks it.
column, _ = confine._ARCHITECTURES[os.uname().machine]
number = {{**confine._DANGEROUS, **confine._ACTING}}[{refused!r}][column]
confine._install([
    confine._op(confine._LOAD, confine._NUMBER_AT),
    confine._op(confine._EQUAL, number, 0, 1),
    confine._op(confine._RETURN, confine._REFUSE | errno.EPERM),
    confine._op(confine._RETURN, confine._ALLOW),
])
from infir2.reward.sandbox import Sandbox, sandbox_report
logging.basicConfig(stream=sys.stdout)
print([layer.name for layer in sandbox_report() if not layer.works])
try:
    Sandbox()
    print("OPEN")
except Exception as error:
    print(type(error).__name__, error)
unsafe = Sandbox(unsafe_code_exec=True)
print(unsafe.layers, unsafe.run_script("print(6 * 7)").stdout)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's seccomp")
@pytest.mark.parametrize(
    ("refused", "layer"),
    [("unshare", "namespaces"), ("pivot_root", "namespaces"), ("landlock_create_ruleset", "landlock")],
)
def test_a_machine_without_a_layer_runs_nothing(refused: str, layer: str) -> None:
    """The missing system call is really refused by the kernel, in a process of its own."""
    run = subprocess.run(
        [sys.executable, "-c", CRIPPLED.format(refused=refused)], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert run.returncode == 0, run.stderr
    missing, error, *rest = run.stdout.splitlines()
    assert layer in missing
    assert error.startswith("SandboxError")
    assert layer in error
    assert "OPEN" not in run.stdout
    assert any("UNSAFE" in line for line in rest)
    assert "b'42\\n'" in rest[-1]


def test_other_systems_run_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    module._probe_all.cache_clear()
    monkeypatch.setattr(sys, "platform", "darwin")
    try:
        assert not any(layer.works for layer in sandbox_report())
        with pytest.raises(SandboxError, match="needs Linux"):
            Sandbox()
    finally:
        module._probe_all.cache_clear()


def test_a_layer_lost_later_is_an_error_not_a_run(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "readable_paths", lambda: ["/proc"])  # the interpreter cannot be started
    with pytest.raises(SandboxError, match="could not be set up"):
        sandbox.run_script("print(1)")
