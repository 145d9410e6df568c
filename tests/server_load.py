"""Traffic for a server with a real engine: many clients at once, each reply kept beside what it answers."""

from __future__ import annotations

import csv
import gc
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from live_server import LiveServer

ROOT = Path(__file__).resolve().parent.parent
MAX_TOKENS = 24
Prompt = tuple[str, str]  # model, text


def reviews(count: int) -> list[str]:
    """Texts of the shipped test rows."""
    with (ROOT / "datasets/sentiment/test.csv").open(encoding="utf-8", newline="") as file:
        return [row["text"] for row, _ in zip(csv.DictReader(file), range(count), strict=False)]


def ask(live: LiveServer, prompt: Prompt) -> tuple[int, str]:
    """Status and answer of one greedy request on a connection of its own."""
    model, text = prompt
    body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": MAX_TOKENS}
    reply = live.post("/v1/chat/completions", body)
    return reply.status, reply.json["choices"][0]["message"]["content"] if reply.status == 200 else reply.text


def ask_all(live: LiveServer, prompts: Sequence[Prompt], *, clients: int) -> list[tuple[int, str]]:
    """The replies to all ``prompts`` in their order, by so many clients at once."""
    with ThreadPoolExecutor(clients) as threads:
        return list(threads.map(lambda prompt: ask(live, prompt), prompts))


def resident_bytes() -> int:
    """Memory of this process now."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
