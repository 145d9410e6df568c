"""`qlora-kit serve`: the base and every adapter of a store behind OpenAI's API, with a page to try them."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_kit.adapters.store import DEFAULT_STORE
from qlora_kit.cli.adapters import StoreOption
from qlora_kit.cli.engine import open_store_engine
from qlora_kit.cli.generation import BaseOption
from qlora_kit.cli.output import JsonOption, in_units, print_json, say
from qlora_kit.errors import ConfigError
from qlora_kit.server.settings import KEY_VARIABLE, SHORT_KEY_CHARACTERS, ServerSettings, listen
from qlora_kit.units import parse_size

if TYPE_CHECKING:
    from qlora_kit.server.served_models import ServedModels


def serve(
    *,
    base: BaseOption = None,
    store: StoreOption = DEFAULT_STORE,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but this machine's own needs an API key.")
    ] = ServerSettings.host,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = ServerSettings.port,
    api_key: Annotated[
        str | None,
        typer.Option(envvar=KEY_VARIABLE, help="What clients must send; other users of the machine see this option."),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="A file that holds the API key.")] = None,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="A further name that requests may give as their Host; repeatable.")
    ] = None,
    max_batch: Annotated[
        int, typer.Option(min=1, max=1024, help="Answers generated at once.")
    ] = ServerSettings.max_running,
    kv_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="For keys and values, such as 4GiB; else a share of what is free."),
    ] = None,
    max_queue: Annotated[
        int, typer.Option(min=0, max=1024, help="Answers that may wait; more get 429.")
    ] = ServerSettings.max_waiting,
    timeout: Annotated[
        float, typer.Option(min=1, max=86400, help="Longest answer, in seconds; then 408.")
    ] = ServerSettings.deadline_seconds,
    drain: Annotated[
        int, typer.Option(min=0, max=3600, help="Seconds for running answers after SIGTERM.")
    ] = ServerSettings.drain_seconds,
    json: JsonOption = False,
) -> None:
    """Serve the base and every adapter of the store, until Ctrl-C or SIGTERM."""
    kv_bytes = _kv_bytes(kv_memory)
    settings = ServerSettings(
        host=host,
        port=port,
        api_key=_key(api_key, api_key_file),
        allowed_hosts=tuple(allowed_host or ()),
        max_running=max_batch,
        max_waiting=max_queue,
        deadline_seconds=timeout,
        drain_seconds=drain,
    )
    if settings.api_key is not None and len(settings.api_key) < SHORT_KEY_CHARACTERS:
        say(f"the API key is short; {SHORT_KEY_CHARACTERS} random characters or more cannot be guessed")
    with listen(settings) as listener:
        address, taken = listener.getsockname()[:2]
        url = f"http://[{address}]:{taken}" if ":" in address else f"http://{address}:{taken}"
        if not store.exists():
            say(f"{store}: there is no such folder yet; adapters that `adapters add` puts there will be served")
        say(f"loading the base and the adapters in {store}")
        engine = open_store_engine(base, store, max_batch=max_batch, kv_bytes=kv_bytes)
        budget = engine.stats().kv_budget_bytes
        say(f"keys and values of all requests may take {in_units(budget)} (--kv-memory)")
        _log_what_happens()
        from qlora_kit.server.serving import serve_engine

        stop = serve_engine(engine, settings, listener, lambda models: _tell(url, models, budget, json=json))
    if stop.cut:
        say(f"{stop.cut} answers were cut off: they took longer than --drain {drain}")
        raise typer.Exit(128 + (stop.signal or 0))


def _kv_bytes(text: str | None) -> int | None:
    size_bytes = None if text is None else parse_size(text)
    if text is not None and size_bytes is None:
        fix = "correct it, or leave it out: then a share of what is free"
        raise ConfigError(f"--kv-memory is {text!r}", expected="a size such as 4GiB or 500MB", fix=fix)
    return size_bytes


def _key(given: str | None, file: Path | None) -> str | None:
    """The API key from the option, the environment or the file; None where none of them is given.

    Raises:
        ConfigError: The file cannot be read, or both are given.
    """
    if file is None:
        return given
    if given is not None:
        raise ConfigError(
            "the API key is given twice", expected=f"--api-key-file, --api-key or {KEY_VARIABLE}", fix="leave one out"
        )
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError as error:
        reason = error.strerror
    except UnicodeDecodeError:
        reason = "it is no text"
    what = f"{file}: the API key cannot be read: {reason}"
    raise ConfigError(what, expected="a text file with the key", fix="give another file")


def _log_what_happens() -> None:
    """Adapters that come and go are told; every request only with QLORA_KIT_LOG=INFO."""
    if "QLORA_KIT_LOG" not in os.environ:
        logging.getLogger("qlora_kit.server.watching").setLevel(logging.INFO)
        logging.getLogger("uvicorn").setLevel(logging.ERROR)


def _tell(url: str, models: ServedModels, kv_budget_bytes: int, *, json: bool) -> None:
    adapters = list(models.adapters)
    if json:
        print_json({"url": url, "base": models.base, "adapters": adapters, "kv_budget_bytes": kv_budget_bytes})
    served = f"{models.base} and {len(adapters)} adapter{'' if len(adapters) == 1 else 's'}"
    say(f"{url}  serves {served}: open it to try them; the API is at {url}/v1; Ctrl-C ends it")
