"""What the server makes of many clients: requests and tokens a second, time to the first token, `/health` under abuse.

    python benchmarks/serve.py [--quick] [--base BASE] [--store DIR] [--json FILE]

One process serves the base and its adapters; this one sends greedy chat requests of the shipped test rows, each on a
connection of its own, the adapters taking turns: 1, 4, 16 and 64 clients at once, in rounds that go through all of
them, so that other work on the machine meets each alike. Then the engine alone answers the same prompts without HTTP,
one by one and in batches. Compare by ratio: the clients take their share of the same processor cores.
"""

from __future__ import annotations

import argparse
import csv
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
CLIENTS = (1, 4, 16, 64)
BATCHES = (1, 16)
MAX_TOKENS = 32
SLOW_CLIENTS = 200
LARGE_BODY = b'{"model": "' + b"a" * (10 << 20)
CHAT = "/v1/chat/completions"
Prompt = tuple[str, str]  # model, text


@contextmanager
def served(base: str | None, store: Path) -> Iterator[tuple[int, list[str]]]:
    """A server in a process of its own: its port, and the models that it serves."""
    command = [sys.executable, "-c", "from qlora_kit.cli import main; main()", "serve", "--port", "0", "--json"]
    command += ["--store", str(store), *([] if base is None else ["--base", base])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    if process.stdout is None:
        raise RuntimeError("the server's output cannot be read")
    try:
        ready = json.loads(process.stdout.readline())
        yield int(ready["url"].rpartition(":")[2]), [*ready["adapters"], ready["base"]]
    finally:
        process.terminate()
        process.wait()


def post(port: int, body: bytes) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
    return connection.getresponse()


def body_of(prompt: Prompt, *, stream: bool) -> bytes:
    model, text = prompt
    messages = [{"role": "user", "content": text}]
    fields = {"model": model, "messages": messages, "max_tokens": MAX_TOKENS, "temperature": 0, "stream": stream}
    return json.dumps(fields).encode()


def tokens_of(port: int, prompt: Prompt) -> int:
    """Send one request; returns the length of its answer."""
    response = post(port, body_of(prompt, stream=False))
    content = json.loads(response.read())
    return int(content["usage"]["completion_tokens"])


def first_token_seconds(port: int, prompt: Prompt) -> float:
    """Send one streamed request; returns the time to the first piece of its answer."""
    began = time.perf_counter()
    response = post(port, body_of(prompt, stream=True))
    first = None
    for line in response:
        if first is None and line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
            first = time.perf_counter() - began
    return time.perf_counter() - began if first is None else first


def traffic(port: int, prompts: Sequence[Prompt], clients: int) -> dict[str, float]:
    """All ``prompts`` by so many clients, whole and then streamed."""
    with ThreadPoolExecutor(clients) as threads:
        began = time.perf_counter()
        tokens = sum(threads.map(lambda prompt: tokens_of(port, prompt), prompts))
        seconds = time.perf_counter() - began
        waits = list(threads.map(lambda prompt: first_token_seconds(port, prompt), prompts))
    return {
        "requests_per_second": len(prompts) / seconds,
        "tokens_per_second": tokens / seconds,
        "first_token_seconds": statistics.median(waits),
    }


def engine_alone(base: str | None, store: Path, prompts: Sequence[Prompt], rounds: int) -> dict[str, dict[str, float]]:
    """The same prompts by the engine without a server, in batches of each size."""
    from qlora_kit.cli.engine import open_store_engine
    from qlora_kit.conversation import Message
    from qlora_kit.generation import Sampling

    engine = open_store_engine(base, store, max_batch=max(BATCHES))
    adapters = [None if model not in engine.available() else model for model, _ in prompts]
    turns = [[Message("user", text)] for _, text in prompts]
    found: dict[int, list[dict[str, float]]] = {size: [] for size in BATCHES}
    for _ in range(rounds):
        for size in BATCHES:
            began = time.perf_counter()
            answers = engine.generate(turns, adapter=adapters, sampling=Sampling(MAX_TOKENS), batch_size=size)
            seconds = time.perf_counter() - began
            tokens = sum(answer.completion_tokens for answer in answers)
            found[size].append({"requests_per_second": len(prompts) / seconds, "tokens_per_second": tokens / seconds})
    return {f"batches of {size}": medians(runs) for size, runs in found.items()}


def medians(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(run[name] for run in runs), 4) for name in runs[0]}


def longest_health_seconds(port: int, prompts: Sequence[Prompt]) -> float:
    """The longest answer of ``/health`` beside slow clients, large bodies and 64 waiting requests."""
    slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(SLOW_CLIENTS)]
    for client in slow:
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
    threads = [threading.Thread(target=lambda: post(port, LARGE_BODY).read()) for _ in range(4)]
    threads += [threading.Thread(target=tokens_of, args=(port, prompt)) for prompt in prompts[:64]]
    for thread in threads:
        thread.start()
    times: list[float] = []
    while any(thread.is_alive() for thread in threads) or len(times) < 10:
        began = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/health")
        if connection.getresponse().status != 200:
            raise RuntimeError("/health failed")
        times.append(time.perf_counter() - began)
        connection.close()
    for client in slow:
        client.close()
    return max(times)


def texts(count: int) -> list[str]:
    with (ROOT / "datasets/sentiment/test.csv").open(encoding="utf-8", newline="") as file:
        return [row["text"] for row, _ in zip(csv.DictReader(file), range(count), strict=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1 round of 48 requests instead of 3 of 160")
    parser.add_argument("--base", help="as of `qlora-kit serve`")
    parser.add_argument("--store", type=Path, default=ROOT / "adapters", help="adapters to serve")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    rounds, count = (1, 48) if arguments.quick else (3, 160)
    found: dict[int, list[dict[str, float]]] = {clients: [] for clients in CLIENTS}
    with served(arguments.base, arguments.store) as (port, models):
        prompts = [(models[index % len(models)], text) for index, text in enumerate(texts(count))]
        traffic(port, prompts[:64], 16)  # every place has been in use once
        for _ in range(rounds):
            for clients in CLIENTS:
                found[clients].append(traffic(port, prompts[: count if clients > 1 else count // 4], clients))
        health = longest_health_seconds(port, prompts)
    rows = {f"{clients} client{'' if clients == 1 else 's'}": medians(runs) for clients, runs in found.items()}
    alone = engine_alone(arguments.base, arguments.store, prompts[: count // 2], rounds)
    ratio = rows["16 clients"]["requests_per_second"] / rows["1 client"]["requests_per_second"]
    show(rows, alone, ratio=ratio, health=health)
    if arguments.json is not None:
        figures = {
            "base": models[-1],
            "adapters": len(models) - 1,
            "max_tokens": MAX_TOKENS,
            "rounds": rounds,
            "processors": os.cpu_count(),
            "server": rows,
            "engine_alone": alone,
            "ratio_16_clients_to_1": round(ratio, 2),
            "longest_health_seconds": round(health, 3),
        }
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def show(rows: dict[str, dict[str, float]], alone: dict[str, dict[str, float]], *, ratio: float, health: float) -> None:
    table = Table(title=f"medians; answers of at most {MAX_TOKENS} tokens")
    for column in ("", "requests/s", "tokens/s", "first token, s"):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in {**rows, **{f"engine alone, {name}": row for name, row in alone.items()}}.items():
        first = f"{row['first_token_seconds']:.3f}" if "first_token_seconds" in row else ""
        table.add_row(name, f"{row['requests_per_second']:.1f}", f"{row['tokens_per_second']:.0f}", first)
    console = Console()
    console.print(table)
    console.print(f"16 clients get {ratio:.1f} times the requests of one; /health took at most {health:.3f} s")


if __name__ == "__main__":
    main()
