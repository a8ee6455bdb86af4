"""The process around the app: a socket, the line that says it is ready, and a quiet end when it is told to stop."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from infir2.errors import ConfigError


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one. Raises ConfigError where the address cannot be had."""
    if not 0 <= port <= 65_535:
        raise ConfigError(f"--port: {port} is not between 0 and 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"{host}:{port}: cannot listen there: {error.strerror or error}") from None
    return listener


def stop_at_end_of_input() -> None:
    """Stop as SIGTERM does when standard input ends: however the program that started this one ends, it does then."""

    def watch() -> None:
        with contextlib.suppress(OSError):  # it may have been closed from the start
            while os.read(0, 4096):
                pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="end of input", daemon=True).start()


def serve(app: FastAPI, listener: socket.socket, grace_s: float, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT. Requests under way then have ``grace_s`` seconds; new ones are not taken.

    ``ready`` is called when requests are answered. Returns normally: to be told to stop is no error.
    """
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, lifespan="on",
        timeout_graceful_shutdown=int(grace_s), timeout_keep_alive=30,
    )  # fmt: skip
    server = _Server(config, ready)
    # uvicorn raises the signal that ended it once more when it is done: nobody has to die of it.
    previous = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self._ready()
