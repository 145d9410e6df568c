"""A small Hub on this machine, and what the kit reads from it: run by `test_data_hub.py` in a process of its own.

The libraries read the Hub's address once, while they are imported; so the rows are read here and printed as JSON.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

COMMIT = "c0ffee" + "0" * 34
PLAIN = [{"prompt": f"q{number}", "completion": f"a{number}"} for number in range(5)]
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def card(**files: str) -> bytes:
    """A README that declares subsets by their data files."""
    configs = "".join(f"- config_name: {name}\n  data_files: {file}\n" for name, file in files.items())
    return f"---\nconfigs:\n{configs}---\n".encode()


class Hub(BaseHTTPRequestHandler):
    """Serves the files of ``repositories``: the four kinds of request that `datasets` and `huggingface_hub` make."""

    protocol_version = "HTTP/1.1"
    repositories: dict[str, dict[str, bytes]] = {}  # noqa: RUF012
    gated = "org/gated"
    dropped = ""  # the connection is dropped where this file is asked for
    requests = 0

    def log_message(self, *_: object) -> None:
        """Nothing is logged."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        type(self).requests += 1
        parts = [unquote(part) for part in urlparse(self.path).path.split("/")[1:]]
        if parts[:2] == ["api", "datasets"]:
            files = self.repositories.get("/".join(parts[2:4]))
            if files is None:
                self.answer(404, error="RepoNotFound")
            elif parts[4:5] == ["tree"]:
                self.list_folder(files, "/".join(parts[6:]))
            else:
                self.answer(200, json.dumps({"id": "/".join(parts[2:4]), "sha": COMMIT}).encode())
        elif parts[0] == "datasets" and parts[3:4] == ["resolve"]:
            self.send_file("/".join(parts[1:3]), parts[4], "/".join(parts[5:]))
        else:
            self.answer(404)

    def list_folder(self, files: dict[str, bytes], folder: str) -> None:
        found = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in files.items()
            if path.rpartition("/")[0] == folder
        ]
        self.answer(200, json.dumps(found).encode()) if found else self.answer(404, error="EntryNotFound")

    def send_file(self, repository: str, revision: str, path: str) -> None:
        files = self.repositories.get(repository)
        if files is None:
            self.answer(401, error="RepoNotFound")
        elif repository == self.gated:
            self.answer(401, error="GatedRepo")
        elif revision not in ("main", COMMIT):
            self.answer(404, error="RevisionNotFound")
        elif path not in files:
            self.answer(404, error="EntryNotFound")
        elif path == self.dropped and self.command == "GET":
            self.close_connection = True
        else:
            content = files[path]
            first, _, last = (
                self.headers.get("Range", f"bytes=0-{len(content) - 1}").removeprefix("bytes=").partition("-")
            )
            part = content[int(first) : int(last or len(content)) + 1]
            place = {"Content-Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"}
            tag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}
            self.answer(
                206 if "Range" in self.headers else 200, part, **(place if "Range" in self.headers else {}), **tag
            )

    def answer(self, status: int, body: bytes = b"", *, error: str = "", **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "X-Repo-Commit": COMMIT, "X-Error-Code": error}.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def parquet(rows: list[dict[str, Any]], **features: Any) -> bytes:
    """As `datasets` writes it, without the library that it needs to look at images."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    schema = datasets.Features(features).arrow_schema
    columns = {name: [row[name] for row in rows] for name in schema.names}
    pyarrow.parquet.write_table(pyarrow.table(columns, schema=schema), file)
    return file.getvalue()


def repositories() -> dict[str, dict[str, bytes]]:
    import datasets

    text, number = datasets.Value("string"), datasets.ClassLabel(names=["negative", "positive"])
    return {
        "org/plain": {"train.jsonl": jsonl(PLAIN), "validation.jsonl": jsonl(PLAIN[:1])},
        "org/gated": {"train.jsonl": jsonl(PLAIN)},
        "org/subsets": {
            "README.md": card(en="en.jsonl", fr="fr.jsonl"),
            "en.jsonl": jsonl([{"text": "one"}]),
            "fr.jsonl": jsonl([{"text": "un"}]),
        },
        "org/script": {"script.py": b"raise SystemExit('run')", "train.jsonl": jsonl(PLAIN)},
        "org/outside": {"README.md": card(default=str(Path("secret.jsonl").absolute()))},
        "org/labels": {
            "train.parquet": parquet([{"text": "a", "label": 1}, {"text": "b", "label": -1}], text=text, label=number)
        },
        "org/turns": {
            "train.parquet": parquet(
                [{"messages": {key: [turn[key] for turn in TURNS] for key in ("role", "content")}}],
                messages=datasets.Sequence({"role": text, "content": text}),
            )
        },
        "org/images": {
            "train.parquet": parquet(
                [{"text": "a", "image": {"bytes": b"no image", "path": None}}], text=text, image=datasets.Image()
            )
        },
        "org/columns": {"train-0.jsonl": jsonl([{"a": 1}]), "train-1.jsonl": jsonl([{"b": "x"}])},
        "org/empty": {"train.jsonl": b""},
        "org/shards": {"train-0.jsonl": jsonl(PLAIN), "train-1.jsonl": jsonl(PLAIN)},
    }


def describe(items: Iterator[Any]) -> list[dict[str, Any]]:
    return [{"kind": type(item).__name__, **asdict(item)} for item in items]


def read_everything() -> dict[str, Any]:
    """What ``read_hub_rows`` yields for each source, by the name of what is shown."""
    from qlora_kit.data.hub import HubSource, read_hub_rows, resolve

    sources = {
        "plain": HubSource("org/plain"),
        "rows": HubSource("org/plain", rows=2),
        "slice": HubSource("org/plain", split="train[1:3]"),
        "joined": HubSource("org/plain", split="validation+train"),
        "commit": HubSource("org/plain", revision=COMMIT),
        "stream": HubSource("org/plain", streaming=True),
        "stream of 2": HubSource("org/plain", streaming=True, rows=2),
        "no split": HubSource("org/plain", split="valid"),
        "no stream split": HubSource("org/plain", split="valid", streaming=True),
        "no revision": HubSource("org/plain", revision="v9"),
        "bad slice": HubSource("org/plain", split="train[:x]"),
        "missing": HubSource("org/missing"),
        "gated": HubSource("org/gated"),
        "which subset": HubSource("org/subsets"),
        "no subset": HubSource("org/subsets", subset="fe"),
        "subset": HubSource("org/subsets", subset="fr"),
        "script": HubSource("org/script"),
        "outside": HubSource("org/outside"),
        "labels": HubSource("org/labels"),
        "turns": HubSource("org/turns"),
        "streamed turns": HubSource("org/turns", streaming=True),
        "images": HubSource("org/images"),
        "streamed images": HubSource("org/images", streaming=True),
        "columns": HubSource("org/columns"),
        "streamed columns": HubSource("org/columns", streaming=True),
        "empty": HubSource("org/empty"),
    }
    read = {name: describe(read_hub_rows(source)) for name, source in sources.items()}
    Hub.dropped = "train-1.jsonl"
    resolved = resolve(HubSource("org/shards", streaming=True))
    return {**read, "broken stream": describe(read_hub_rows(resolved)), "resolved": resolved.commit}


def read_without_server() -> dict[str, Any]:
    """What is read of data sets read before, and not read before, when the Hub does not answer any more."""
    from qlora_kit.data.hub import HubSource, read_hub_rows

    plain = HubSource("org/plain")
    return {
        "unreachable": describe(read_hub_rows(plain)),
        "unreachable tag": describe(read_hub_rows(HubSource("org/plain", revision="v9"))),
        "unreachable and unknown": describe(read_hub_rows(HubSource("org/never"))),
    }


def main() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"

    time.sleep = lambda _: None  # the libraries wait before they ask again
    Hub.repositories = repositories()
    read = read_everything()
    server.shutdown()
    server.server_close()
    print(json.dumps({**read, **read_without_server()}))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
