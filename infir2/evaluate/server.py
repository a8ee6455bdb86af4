"""A server of our own for as long as an evaluation lasts: started, awaited, and stopped whatever happens."""

import http.client
import json
import os
import queue
import secrets
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from types import TracebackType
from typing import IO

from infir2.errors import ConfigError, UserError

KEY_VARIABLE = "INFIR2_API_KEY"
"""Environment variable with the key that servers ask for and clients show."""
_STOP_S = 15.0
_TAIL = 2000  # characters of the server's complaints that are shown


class LocalServer:
    """``infir2 serve MODEL`` as a child process. Enter it to start it; then ``url`` and ``api_key`` are set.

    Entering raises UserError, with what the server said, where it does not get ready within ``timeout_s`` seconds. The
    server stops when it is left, and also when this process dies: it watches its standard input.
    """

    def __init__(self, model: str, options: Sequence[str] = (), timeout_s: float = 1800.0) -> None:
        self.model, self.options, self.timeout_s = model, list(options), timeout_s
        self.api_key = secrets.token_urlsafe(32)
        self.url = ""
        """Base URL, ending in /v1."""
        self.name = ""
        """What requests call the model."""
        self.process: subprocess.Popen[str] | None = None
        self._log: IO[str] | None = None
        self._reader: threading.Thread | None = None

    def __enter__(self) -> "LocalServer":
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        command = [sys.executable, "-m", "infir2", "serve", self.model, "--port", "0", "--until-eof", *self.options]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env={**os.environ, KEY_VARIABLE: self.api_key},
        )  # fmt: skip
        try:
            self._await_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> int | None:
        """Ask it to stop, then make it; its exit code."""
        process, log = self.process, self._log
        if process is None or log is None:
            return None
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if self._reader is not None:
            self._reader.join()
        for pipe in (process.stdin, process.stdout, log):
            if pipe is not None:
                pipe.close()
        self._log = None
        return process.returncode

    def complaints(self) -> str:
        """The end of what it has written to standard error."""
        if self._log is None:
            return ""
        self._log.seek(0)
        return self._log.read()[-_TAIL:].strip()

    def _await_ready(self) -> None:
        """Wait for the line that says so, then ask /health."""
        assert self.process is not None
        assert self.process.stdout is not None
        lines: queue.Queue[str] = queue.Queue()
        stdout = self.process.stdout

        def read() -> None:
            for line in stdout:
                lines.put(line)
            lines.put("")  # its end

        self._reader = threading.Thread(target=read, name="server output", daemon=True)
        self._reader.start()
        deadline = time.monotonic() + self.timeout_s
        while not self.url:
            try:
                line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise UserError(f"{self.model}: the server was not ready after {self.timeout_s:g} s") from None
            if not line:
                self.process.wait(_STOP_S)
                raise UserError(f"{self.model}: the server ended at its start: {self.complaints()}")
            if line.startswith("infir2 serve: ready: "):
                self.name, _, self.url = line.removeprefix("infir2 serve: ready: ").strip().rpartition(" at ")
        require_health(self.url)


def require_health(url: str) -> None:
    """Raise UserError unless the /health beside ``url`` (ending in /v1) says that all is well."""
    where = url.removesuffix("/v1") + "/health"
    try:
        with urllib.request.urlopen(where, timeout=10) as reply:
            reply.read()
    except (urllib.error.URLError, OSError) as error:
        raise UserError(f"{where}: {getattr(error, 'reason', error)}") from None


def base_url(text: str) -> str:
    """The address of an OpenAI-compatible server without a slash at its end. Raises ConfigError for anything else."""
    try:
        parts = urllib.parse.urlsplit(text)
        whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number
        whole = False
    if not whole or not text.isascii() or not text.isprintable() or " " in text:
        raise ConfigError(f"--api-url {text}: is not the address of a server, such as http://127.0.0.1:8000/v1")
    return text.rstrip("/")


def served_models(url: str, api_key: str) -> list[str] | None:
    """What GET {url}/models lists; None where the server has no such list. Raises UserError where nobody answers."""
    request = urllib.request.Request(f"{url}/models", headers={"Authorization": f"Bearer {api_key}"})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return [str(model["id"]) for model in json.load(reply)["data"]]
    except (http.client.HTTPException, OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, urllib.error.HTTPError) and error.code in (404, 405, 501):
            return None
        reason = getattr(error, "reason", None) or error
        raise UserError(f"{url}/models: no OpenAI-compatible server answers: {reason}") from None
