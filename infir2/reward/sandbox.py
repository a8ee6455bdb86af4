"""Run untrusted Python in a cage: no network, no files but its own, bounded in time, memory, processes and output.

Layers, each of which has to work or nothing is run at all:

- *namespaces*: a user, network, process, IPC, host name and mount namespace of its own. The program is nobody, sees no
  other process and no /proc, and lives in a root made of the interpreter and the system's libraries, read-only, and one
  empty folder in memory. When it ends or its time is up, the kernel ends all it has started.
- *landlock*: the kernel refuses to open any file outside those, whatever happened to the mounts.
- *seccomp*: no sockets but AF_UNIX, no new namespaces, no tracing, no keys, BPF, io_uring or other wide kernel surface.
- *limits*: CPU, memory, size of files, open files, processes; output is read up to a limit and no further.

What it does not protect from: faults of the kernel, and side channels (timing, caches). It bounds the memory of each
process, so that a program can hold ``processes * memory_mib`` (+ ``folder_mib``), and burn ``wall_s`` on as many cores
as it has processes. The program can read the interpreter's own folder, /usr and /lib. Nothing here speaks for the
truth of what a program prints: see code.py for the verdict.
"""

import contextlib
import functools
import json
import logging
import marshal
import os
import platform
import secrets
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

from infir2.errors import UserError
from infir2.reward.cores import usable_cores

LAYERS = ("namespaces", "landlock", "seccomp")
Status = Literal["exited", "signal", "timeout", "output"]
_log = logging.getLogger(__name__)
_LAUNCH = "import sys; sys.path.append({root!r}); from infir2.reward.launcher import main; main()"
_SYSTEM_PATHS = ("/usr", "/lib", "/lib64", "/lib32", "/etc/ld.so.cache")
_STDERR_BYTES = 16_384
# Time limits are on the wall: with more programs at once than cores, a verdict would depend on who else is judged.
_ROOM = threading.BoundedSemaphore(usable_cores())


class SandboxError(UserError):
    """The machine cannot hold untrusted code, so none is run."""


@dataclass(frozen=True)
class Limits:
    """Bounds of one run. MiB are 2**20 bytes."""

    wall_s: float = 10.0
    cpu_s: int = 10
    memory_mib: int = 1024
    """Address space of each process."""
    processes: int = 16
    """At once, threads included."""
    files: int = 64
    file_mib: int = 16
    folder_mib: int = 32
    """All files of the working folder together."""
    output_kib: int = 1024
    """Standard output, and results of calls; a program that exceeds it is ended."""
    source_kib: int = 256


@dataclass(frozen=True)
class ProgramRun:
    """How a program ended, and what it left."""

    status: Status
    """``exited`` by itself, ended by a ``signal`` (its memory or CPU limit may be behind it), by ``timeout``, or for
    too much ``output``."""
    code: int | None
    """Exit code, or the negative number of the signal; None if we ended it. A zero proves nothing: see code.py."""
    stdout: bytes
    stderr: bytes
    """Its first 16 KiB."""
    results: bytes
    """What calls returned: one JSON value a line."""
    wall_s: float


@dataclass(frozen=True)
class Layer:
    """One line of the report."""

    name: str
    works: bool
    detail: str


class Sandbox:
    """Runs programs, each in a cage of its own. Safe to use from several threads: all sandboxes of this process
    together run as many programs at once as there are cores, and time begins when a program's turn has come.

    Raises SandboxError at once where a layer is missing. ``unsafe_code_exec=True`` runs programs all the same, with the
    layers there are; use it inside a container or machine that you can lose. Without namespaces nothing bounds the
    number of processes, and those a program leaves behind live on.
    """

    def __init__(self, limits: Limits | None = None, unsafe_code_exec: bool = False) -> None:
        self.limits = limits or Limits()
        missing = [layer for layer in sandbox_report() if not layer.works]
        self.layers: tuple[str, ...] = LAYERS
        if missing:
            what = "; ".join(f"{layer.name}: {layer.detail}" for layer in missing)
            if not unsafe_code_exec:
                raise SandboxError(
                    f"this machine cannot run untrusted code safely ({what}). Use one that allows user namespaces "
                    f"and Landlock (Linux 5.13 or later), or pass unsafe_code_exec=True in a container you can lose."
                )
            _log.warning("UNSAFE: untrusted code runs without %s", what)
            works = {layer.name for layer in sandbox_report() if layer.works}
            self.layers = tuple(name for name in LAYERS if name in works)
        elif unsafe_code_exec:
            _log.warning("unsafe_code_exec is set but not needed: every layer of the sandbox works here")

    def run_script(self, source: str, stdin: bytes = b"") -> ProgramRun:
        """Run a program as a script. ``stdin`` is its whole standard input."""
        return self._run(source, stdin, ("script", "-"))

    def run_calls(self, source: str, function: str, calls: Sequence[Sequence[Any]]) -> ProgramRun:
        """Call ``function`` (or ``Solution().function``) of a program with each list of arguments (JSON values)."""
        return self._run(source, json.dumps(list(calls)).encode(), ("calls", function))

    def _run(self, source: str, stdin: bytes, how: tuple[str, str]) -> ProgramRun:
        if len(source.encode("utf-8", "replace")) > self.limits.source_kib << 10:
            return ProgramRun("signal", None, b"", b"source too long", b"", 0.0)
        with _ROOM:
            return launch(source.encode("utf-8", "replace").decode(), stdin, how, self.limits, self.layers, proved=True)


def launch(
    source: str, stdin: bytes, how: tuple[str, str], limits: Limits, layers: Sequence[str], proved: bool = False
) -> ProgramRun:
    """One run with exactly these layers. SandboxError if one of them cannot be put up.

    A cage that is killed without having told how the program ended is a SandboxError, too, unless it is ``proved`` that
    this machine can hold programs: then it is the program's own fault (memory that ran out, for instance).
    """
    nonce = secrets.token_hex(16)
    with contextlib.ExitStack() as stack:
        folder = None if "namespaces" in layers else stack.enter_context(_scratch_folder())
        job = _job(source, how, limits, layers, nonce, folder)
        control, given = stack.enter_context(_file(marshal.dumps(job))), stack.enter_context(_file(stdin))
        reader = _Reader(limits, stack)
        command = [job["python"], "-I", "-S", "-B", "-c", _LAUNCH.format(root=str(Path(__file__).parents[2]))]
        began = time.monotonic()
        process = subprocess.Popen(
            [*command, *map(str, (control.fileno(), reader.write_ends["status"], reader.write_ends["results"]))],
            stdin=given, stdout=reader.write_ends["stdout"], stderr=reader.write_ends["stderr"],
            pass_fds=(control.fileno(), reader.write_ends["status"], reader.write_ends["results"]),
            env={"LANG": "C.UTF-8"}, cwd="/", start_new_session=True,
        )  # fmt: skip
        try:
            reader.close_write_ends()
            stopped = reader.read_until(began + limits.wall_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            launcher = process.wait()  # of one that closed its pipes by ending, our signal does not change the code
        silence = signal.SIGKILL if proved and launcher <= 0 else None
        return _verdict(reader.taken, stopped, nonce, time.monotonic() - began, silence)


def _job(
    source: str, how: tuple[str, str], limits: Limits, layers: Sequence[str], nonce: str, folder: str | None
) -> dict[str, Any]:
    inside = Path(__file__).with_name("program.py").read_text(encoding="utf-8") + "\nmain()\n"
    return {
        "nonce": nonce, "layers": list(layers), "limits": asdict(limits), "parent": os.getpid(), "work": folder,
        "source": source, "readable": readable_paths(), "python": _interpreter(),
        # not -I: it would make Python forget the seed of its hashes, and a set of strings change its order by chance
        "arguments": ["-P", "-s", "-S", "-B", "-X", "utf8", "-c", inside, *how],
    }  # fmt: skip


def _interpreter() -> str:
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def readable_paths() -> list[str]:
    """The system's libraries and the interpreter's own folder (not the virtual environment's)."""
    prefixes = {os.path.realpath(prefix) for prefix in (sys.base_prefix, sys.base_exec_prefix)}
    if unfit := prefixes & {"/", "/tmp", os.path.realpath(Path.home())}:
        raise SandboxError(f"the interpreter's folder is {unfit.pop()}, which would show untrusted code too much")
    return [*_SYSTEM_PATHS, *sorted(prefixes)]


def _verdict(
    taken: dict[str, bytes], stopped: Status | None, nonce: str, wall_s: float, silence: int | None
) -> ProgramRun:
    """``silence``: the signal that a run without a word was ended by; None where silence is a fault of the sandbox."""
    words = {}
    for line in taken["status"].decode("utf-8", "replace").splitlines():
        mark, _, rest = line.partition(" ")
        if secrets.compare_digest(mark.encode(), nonce.encode()):
            word, _, detail = rest.partition(" ")
            words[word] = detail
    if "broken" in words:
        raise SandboxError(f"the sandbox could not be set up: {words['broken']}")
    output = taken["stdout"], taken["stderr"], taken["results"]
    if stopped:
        return ProgramRun(stopped, None, *output, wall_s)
    if "ended" not in words and silence is not None:
        return ProgramRun("signal", -silence, *output, wall_s)
    if "ended" not in words:
        last = taken["stderr"].decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise SandboxError(f"the sandbox ended without a word: {last[-300:] or 'it was killed'}")
    code = int(words["ended"])
    if code == -signal.SIGXCPU:
        return ProgramRun("timeout", code, *output, wall_s)
    return ProgramRun("signal" if code < 0 else "exited", code, *output, wall_s)


class _Reader:
    """Reads four pipes at once, each up to its bound, until all are closed, one is over it, or the time is up."""

    def __init__(self, limits: Limits, stack: contextlib.ExitStack) -> None:
        bound = limits.output_kib << 10
        self.bounds = {"stdout": bound, "results": bound, "stderr": _STDERR_BYTES, "status": 8192}
        self.taken = dict.fromkeys(self.bounds, b"")
        self.read_ends: dict[str, IO[bytes]] = {}
        self.write_ends: dict[str, int] = {}
        self._closed = False
        stack.callback(self.close_write_ends)
        for name in self.bounds:
            reading, self.write_ends[name] = os.pipe()
            self.read_ends[name] = stack.enter_context(os.fdopen(reading, "rb", buffering=0))

    def close_write_ends(self) -> None:
        """So that the end of the last process closes the pipes."""
        if not self._closed:
            self._closed = True
            for descriptor in self.write_ends.values():
                os.close(descriptor)

    def read_until(self, deadline: float) -> Status | None:
        """``timeout`` or ``output`` if the program has to be stopped; None if it ended."""
        kept: dict[str, list[bytes]] = {name: [] for name in self.bounds}
        room, ended = dict(self.bounds), False
        try:
            with selectors.DefaultSelector() as selector:
                for name, file in self.read_ends.items():
                    selector.register(file, selectors.EVENT_READ, name)
                while selector.get_map():
                    left = deadline - time.monotonic()
                    if left <= 0:
                        return None if ended else "timeout"
                    for key, _ in selector.select(left):
                        name = key.data
                        chunk = os.read(key.fd, 65536)
                        if not chunk:
                            selector.unregister(key.fileobj)
                            if name == "status":  # without a process namespace, orphans may hold the other pipes
                                ended, deadline = True, min(deadline, time.monotonic() + 0.5)
                        kept[name].append(chunk[: room[name]])
                        if len(chunk) > room[name] and name != "stderr":  # of stderr the rest is dropped
                            return "output"
                        room[name] -= len(kept[name][-1])
            return None
        finally:
            self.taken = {name: b"".join(chunks) for name, chunks in kept.items()}


@contextlib.contextmanager
def _file(content: bytes) -> Iterator[IO[bytes]]:
    """An open file without a name, to be read only."""
    descriptor, path = tempfile.mkstemp(prefix="infir2-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        reading = open(path, "rb")  # noqa: SIM115  # the program inherits it, and must not be able to write to the disk
    finally:
        os.unlink(path)
    with reading:
        yield reading


@contextlib.contextmanager
def _scratch_folder() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="infir2-untrusted-")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# report ---------------------------------------------------------------------------------------------------------------
_PROBE = """
import json, os, socket, sys
facts, (canary, port) = {}, json.loads(sys.stdin.read())
def attempt(name, action):
    try:
        action()
        facts[name] = True
    except BaseException:
        facts[name] = False
attempt("reads a file outside", lambda: open(canary).read())
attempt("changes a file outside", lambda: os.chmod(canary, 0o600))
attempt("opens a network socket", lambda: socket.socket())
attempt("connects", lambda: socket.create_connection(("127.0.0.1", port), 1))
attempt("sees processes outside", lambda: {True: 1}[os.getpid() > 2])
attempt("holds more memory than allowed", lambda: bytearray(200 << 20))
def breed():
    read, write = os.pipe()
    for _ in range(40):
        if os.fork() == 0:
            os.close(write)
            os.read(read, 1)
            os._exit(0)
attempt("starts more processes than allowed", breed)
print(json.dumps(facts), flush=True)
if os.getpid() <= 2:  # in a namespace: its own group, and whoever else is wrongly in it
    os.kill(0, 9)
os._exit(0)
"""
_PROBE_LIMITS = Limits(wall_s=10, memory_mib=160, processes=8, file_mib=1)
_PROVES = {
    "namespaces": ("reads a file outside", "changes a file outside", "connects", "sees processes outside"),
    "landlock": ("reads a file outside",),
    "seccomp": ("opens a network socket",),
    "limits": ("holds more memory than allowed", "starts more processes than allowed"),
}
_probing = threading.Lock()


def sandbox_report() -> tuple[Layer, ...]:
    """Which layers work on this machine, found out by trying to break each one. Takes 0.2 s, once a process."""
    with _probing:
        return _probe_all()


@functools.cache
def _probe_all() -> tuple[Layer, ...]:
    if not sys.platform.startswith("linux"):
        return tuple(Layer(name, False, f"needs Linux, this is {sys.platform}") for name in _PROVES)
    from infir2.reward import confine  # has Linux-only parts

    if not confine.seccomp_supported():
        return tuple(Layer(name, False, f"not written for {platform.machine()}") for name in _PROVES)
    found = [_probe(name, (name,)) for name in LAYERS]
    if all(layer.works for layer in found):
        found.append(_probe("limits", LAYERS))
    else:
        found.append(Layer("limits", False, "can only be proved with the other layers"))
    return tuple(found)


def _probe(name: str, layers: tuple[str, ...]) -> Layer:
    """Try what the layer has to prevent; the whole sandbox (``limits``) has to prevent everything."""
    forbidden = _PROVES[name] if name != "limits" else tuple({fact for facts in _PROVES.values() for fact in facts})
    with tempfile.TemporaryDirectory() as folder, socket.socket() as listener:
        canary = Path(folder, "canary")
        canary.write_text("seen")
        canary.chmod(0o644)
        Path(folder).chmod(0o755)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        asked = json.dumps([str(canary), listener.getsockname()[1]]).encode()
        try:
            run = launch(_PROBE, asked, ("script", "-"), _PROBE_LIMITS, layers)
            facts = json.loads(run.stdout)
        except (UserError, OSError, ValueError) as error:
            return Layer(name, False, str(error).removeprefix("the sandbox could not be set up: "))
    broken = [fact for fact in forbidden if facts.get(fact, True)]
    return Layer(name, not broken, f"untrusted code {', '.join(broken)}" if broken else "holds")
