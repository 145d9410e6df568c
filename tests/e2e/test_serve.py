"""`qlora-kit serve` on the shipped base and adapters: the answers of `generate`, to many clients, until a signal."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from live_server import LiveServer, serving
from openai import BadRequestError, OpenAI
from scripted_engine import wait_until
from server_load import MAX_TOKENS, ROOT, Prompt, ask_all, reviews

from qlora_kit.adapters import AdapterStore
from qlora_kit.cli import main
from qlora_kit.engine import Engine
from qlora_kit.generation import Sampling
from qlora_kit.server.backend import EngineBackend

KEY = "a-key-of-the-tests-0123456789"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(store=ROOT / "adapters") as found:
        yield found


@pytest.fixture(scope="module")
def live(engine: Engine) -> Iterator[LiveServer]:
    with serving(EngineBackend(engine), ROOT / "adapters") as server:
        yield server


def test_clients_at_once_get_what_the_engine_gives_each_alone(live: LiveServer, engine: Engine) -> None:
    prompts: list[Prompt] = [(model, text) for text in reviews(4) for model in ("sentiment", "translation", "tiny")]
    alone = {}
    for model, text in prompts:
        adapter = None if model == "tiny" else model
        alone[model, text] = engine.ask(text, adapter=adapter, sampling=Sampling(max_new_tokens=MAX_TOKENS)).text
    replies = ask_all(live, prompts * 3, clients=12)
    assert replies == [(200, alone[prompt]) for prompt in prompts * 3]


def test_log_probabilities_and_streams_agree_with_the_answer(live: LiveServer) -> None:
    fields = {"model": "translation", "messages": [{"role": "user", "content": "The small cats are here."}]}
    client = live.client()
    whole = client.chat.completions.create(**fields, logprobs=True, top_logprobs=2).choices[0]  # type: ignore[call-overload]
    tokens = whole.logprobs.content
    assert "".join(token.token for token in tokens) == whole.message.content
    assert all(token.logprob == token.top_logprobs[0].logprob <= 0 for token in tokens)  # greedy takes the likeliest
    streamed = client.chat.completions.create(**fields, stream=True)  # type: ignore[call-overload]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == whole.message.content


def test_a_prompt_beyond_the_context_is_told(live: LiveServer) -> None:
    body = {"model": "sentiment", "messages": [{"role": "user", "content": "word " * 2000}]}
    for stream in (False, True):
        reply = live.post("/v1/chat/completions", {**body, "stream": stream})
        assert reply.status == 400
        assert "tokens long" in reply.json["error"]["message"]
    limit = live.post("/v1/completions", {"model": "tiny", "prompt": "The cat", "max_tokens": 5000})
    assert limit.status == 400


def test_the_examples_of_the_documentation_work(live: LiveServer, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    python, shell = re.findall(r"```python\n(.*?)```", text, re.DOTALL), re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    address = "http://127.0.0.1:8000"
    assert address in python[0] and address in shell[1]
    exec(compile(python[0].replace(address, live.url), "serving.md", "exec"), {})
    assert capsys.readouterr().out == "positive\n"
    models, chat = (shlex.split(command) for command in shell[1].replace("\\\n", "").splitlines())
    assert live.send("GET", models[1].removeprefix(address)).status == 200
    reply = live.post(chat[1].removeprefix(address), chat[chat.index("-d") + 1])
    assert reply.json["choices"][0]["message"]["content"] == "positive"


def test_from_the_command_line(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store")
    store.add(ROOT / "adapters" / "sentiment", "first")
    shutil.copytree(store.root / "first", store.root / "a-bad-one")
    (store.root / "a-bad-one" / "adapter_model.safetensors").write_bytes(b"no tensors")
    (tmp_path / "key").write_text(f"{KEY}\n")
    command = [sys.executable, "-c", "from qlora_kit.cli import main; main()", "serve", "--store", str(store.root)]
    command += ["--port", "0", "--api-key-file", str(tmp_path / "key"), "--kv-memory", "4MiB", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        ready = json.loads(line)
        assert (ready["base"], ready["adapters"], ready["kv_budget_bytes"]) == ("tiny", ["first"], 4 * 2**20)
        client = OpenAI(base_url=f"{ready['url']}/v1", api_key=KEY, max_retries=0)
        reply = client.chat.completions.create(
            model="first", messages=[{"role": "user", "content": "The soup was far from bad."}]
        )
        assert reply.choices[0].message.content == "positive"
        with urlopen(Request(f"{ready['url']}/metrics", headers={"authorization": f"Bearer {KEY}"})) as metrics:
            assert b"qlora_kit_kv_budget_bytes 4.194304e+06" in metrics.read()
        with pytest.raises(BadRequestError, match=r"take \d.* of keys and values"):
            client.completions.create(model="first", prompt="one two three", max_tokens=1000)
        store.add(ROOT / "adapters" / "translation", "second")
        wait_until(lambda: "second" in [model.id for model in client.models.list()], "the new adapter appears")
        reply = client.chat.completions.create(
            model="second", messages=[{"role": "user", "content": "The small cats are under the white table."}]
        )
        assert reply.choices[0].message.content == "Les petits chats sont sous la table blanche."
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (0, "")
        assert "second: served" in err
        assert "left out: " in err and "a-bad-one" in err
        assert KEY not in err
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kv-memory", "many"], "--kv-memory is 'many'"),
        (["--host", "0.0.0.0"], "others on the network could use the server"),
        (["--api-key", "a b"], "a character that an HTTP header cannot carry"),
        (["--api-key-file", "missing"], "missing: the API key cannot be read"),
        (["--api-key", KEY, "--api-key-file", "key"], "the API key is given twice"),
        (["--host", "203.0.113.7", "--api-key", KEY], "cannot listen there"),
        (["--base", "nowhere/at-all"], "nowhere/at-all"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "key").write_text(KEY)
    with pytest.raises(SystemExit) as end:
        main(["serve", "--port", "0", *arguments])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert message in error
    assert "expected:" in error and "do:" in error


def test_a_store_of_several_bases_needs_one_to_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = AdapterStore(tmp_path / "adapters")
    store.add(ROOT / "adapters" / "sentiment", "first")
    store.add(ROOT / "adapters" / "sentiment", "second")
    contract = store.root / "second" / "qlora_kit.json"
    content = json.loads(contract.read_text())
    contract.write_text(json.dumps({**content, "base": {**content["base"], "id": "org/other"}}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["serve", "--port", "0"])
    assert end.value.code == 2
    assert "trained on 2 bases: org/other, tiny" in capsys.readouterr().err
