"""Serve a model over HTTP as OpenAI's API does: `infir2 serve MODEL`.

MODEL is a Hugging Face folder, an FP8 one, a run folder (its newest intact checkpoint is taken) or a checkpoint folder.
Routes: /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics. All but /health want the API key
(Authorization: Bearer KEY). The key is --api-key, else the variable INFIR2_API_KEY, else the content of --key-file,
else a new one, which is printed, or written to --key-file (readable by you alone) if that is given.

It listens on this machine only, unless --host says otherwise, and speaks plain HTTP: put a proxy with TLS before it.
SIGTERM and Ctrl-C end it when the requests under way are answered, at the latest after --grace seconds.
"""

import argparse
import math
import os
import secrets
from pathlib import Path

from rich.console import Console

from infir2.errors import ConfigError
from infir2.evaluate.server import KEY_VARIABLE
from infir2.launch.inference import InferenceOptions, add_inference_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="run, checkpoint or Hugging Face folder")
    add("--name", help="what requests call the model (default: the folder's name)")
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=int, default=8000, help="port; 0 takes a free one, which the ready line names")
    add("--api-key", help=f"other users of this machine can read it there: prefer {KEY_VARIABLE} or --key-file")
    add("--key-file", type=Path, metavar="FILE", help="file with the key; made if it is not there")
    add(
        "--chat-template",
        default="auto",
        help="auto = the tokenizer's own, else chatml; chatml; or a .jinja file (default: auto)",
    )
    add("--max-tokens", type=int, metavar="N", help="most new tokens of one sample (default: the model's positions)")
    add("--max-samples", type=int, default=128, metavar="N", help="most samples of one request")
    add("--max-pending", type=int, default=2048, metavar="N", help="most unfinished samples; then 429")
    add("--max-body-kib", type=int, default=4096, metavar="N", help="largest request, in KiB")
    add(
        "--grace",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds for requests when told to stop (default: %(default)g)",
    )
    add("--until-eof", action="store_true", help="also stop when standard input ends: for programs that start servers")
    add_inference_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from infir2.launch.end_tokens import end_ids
    from infir2.launch.inference import load_engine, model_name
    from infir2.serve.app import Server, make_app
    from infir2.serve.engine_thread import EngineThread
    from infir2.serve.http import listen, serve, stop_at_end_of_input
    from infir2.serve.limits import ServerLimits
    from infir2.serve.prompts import ServedModel

    console = Console(highlight=False, soft_wrap=True)
    if not 0 <= args.grace < math.inf:
        raise ConfigError(f"--grace {args.grace}: give seconds, at least 0")
    limits = ServerLimits(
        body_bytes=args.max_body_kib << 10,
        max_tokens=args.max_tokens,
        samples=args.max_samples,
        pending=args.max_pending,
    )
    key, shown = api_key(args.api_key, args.key_file)
    if args.until_eof:
        stop_at_end_of_input()
    with listen(args.host, args.port) as listener:  # before a model of many GB is loaded
        engine, tokenizer, source = load_engine(args.model, InferenceOptions.of(args), console)
        name = args.name or model_name(args.model)
        served = ServedModel.of(engine, name, tokenizer, end_ids(source), args.chat_template)
        if served.chat is None:
            console.print(f"no chats, plain completions only: {served.chat_problem}")
        if shown:
            console.print(f"API key: {key}")
        app = make_app(Server(EngineThread(engine, limits.pending), served, limits), key)
        host = f"[{args.host}]" if ":" in args.host else args.host
        url = f"http://{host}:{listener.getsockname()[1]}/v1"
        # Plain print: programs that start a server wait for this line.
        serve(app, listener, args.grace, lambda: print(f"infir2 serve: ready: {name} at {url}", flush=True))
    console.print("infir2 serve: stopped")
    return 0


def api_key(given: str | None, file: Path | None) -> tuple[str, bool]:
    """(the key, whether it is new and written nowhere). Raises ConfigError for one that cannot stand in a header."""
    if given is None and (variable := os.environ.get(KEY_VARIABLE)):
        given = variable
    if given is not None:
        return _usable(given, "the API key"), False
    if file is None:
        return secrets.token_urlsafe(32), True
    try:
        # O_EXCL: whoever makes the file is the only one who has ever been able to read it.
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as out:
            key = secrets.token_urlsafe(32)
            out.write(key + "\n")
        return key, False
    except FileExistsError:
        try:
            return _usable(file.read_text(encoding="utf-8").strip(), str(file)), False
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: cannot be read: {error}") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written: {error.strerror}") from None


def _usable(key: str, name: str) -> str:
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"{name}: is empty, or has characters that an HTTP header cannot carry")
    return key
