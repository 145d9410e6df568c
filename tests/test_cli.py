"""Every verb's JSON, exit codes and messages, through the command line's own entry."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qlora_kit.cli import app, main
from qlora_kit.report import can_plot
from qlora_kit.training import TrainResult

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
PROSE = {"into"}  # "merged by qlora-kit into ..."
CARD = {"name", "task", "base_model", "r", "bytes", "created"}


@dataclass(frozen=True)
class Outcome:
    """How one command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object that stdout must be."""
        lines = self.out.splitlines()
        assert len(lines) == 1, self.out
        content = json.loads(lines[0])
        assert isinstance(content, dict)
        return content


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """Runs `qlora-kit ARGUMENTS` in this process, in an empty current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Outcome(int(end.value.code or 0), out, err)

    return call


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may load a model."""
    from transformers import AutoModelForCausalLM

    def loaded(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)


@pytest.fixture
def store(trained_run: tuple[Path, TrainResult], tmp_path: Path) -> Path:
    """A store with one adapter, reviews."""
    from qlora_kit.adapters import AdapterStore

    AdapterStore(tmp_path / "adapters").add(trained_run[0])
    return tmp_path / "adapters"


def refused(outcome: Outcome, *parts: str) -> None:
    """It ended as the user's mistake, in three parts, each of ``parts`` somewhere in it."""
    assert outcome.code == 2, outcome.err
    for part in ("error: ", "\n  expected: ", "\n  do: ", *parts):
        assert part in outcome.err, outcome.err
    assert "Traceback" not in outcome.err


# --- one JSON object for each verb ---


def test_data_prints_its_report(command: Callable[..., Outcome], run_yaml: Path) -> None:
    report = command("data", run_yaml, "--json")
    assert report.code == 0
    content = report.json
    assert content.items() >= {"rows": 63, "kept": 63, "dropped": 0, "truncated": 0, "duplicates": 0}.items()
    assert content.keys() >= {"leaked", "supervised_tokens", "total_tokens", "problems"}
    assert 0 < content["supervised_tokens"] < content["total_tokens"]
    assert "supervised tokens" in command("data", run_yaml).out


def test_data_prints_its_report_of_bad_rows_too(
    command: Callable[..., Outcome], run_yaml: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "Good.", "label": "positive"}\n{"text": "Good.", "label": "fine"}\n')
    report = command("data", run_yaml, f"data.train={tmp_path}/bad.jsonl", "--json")
    assert report.code == 2
    (problem,) = report.json["problems"]
    assert (Path(problem["file"]).name, problem["line"]) == ("bad.jsonl", 2)
    assert f"{problem['reason']}\n  expected: " in report.err


def test_faults_are_told_once_and_alike_ones_together(
    command: Callable[..., Outcome], run_yaml: Path, tmp_path: Path
) -> None:
    turns = [{"from": "human", "value": "Good?"}, {"from": "gpt", "value": "joy"}]
    (tmp_path / "bad.jsonl").write_text(f"{json.dumps({'conversations': turns})}\n" * 3)
    found = command("data", run_yaml, f"data.train={tmp_path}/bad.jsonl")
    assert (found.code, found.out.count("joy"), found.err.count("'joy' is not a label")) == (2, 0, 3)
    assert found.err.count("one of positive, negative, neutral") == 1
    (own,) = re.findall(r"task: (\w+), data.format: (\w+), eval.metrics: (\[\w+\])", found.err)
    advice = (f"task={own[0]}", f"data.format={own[1]}", f"eval.metrics={own[2]}")
    others = ("data.validation=[]", "data.test=[]", "data.on_error=stop")
    assert command("data", run_yaml, f"data.train={tmp_path}/bad.jsonl", *others, *advice).code == 0


def test_no_table_where_nothing_was_read(command: Callable[..., Outcome], run_yaml: Path) -> None:
    found = command("data", run_yaml, "data.train=nope.csv", "data.validation=[]", "data.test=[]")
    refused(found, "nope.csv: the file does not exist")
    assert "supervised tokens" not in found.out and found.err.count("nope.csv") == 1


def test_the_version_is_the_installed_ones(command: Callable[..., Outcome]) -> None:
    asked = command("--version")
    assert (asked.code, asked.out) == (0, f"qlora-kit {version('qlora-kit')}\n")
    code = "import sys\nfrom qlora_kit.cli import main\ntry: main(['--version'])\nfinally: print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "pydantic", "numpy"} & set(loaded)


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "hello", "--adapter", "sentiment", "--adapter", "translation"),
        ("merge", "sentiment", "--out", "here", "--out=there"),
        ("adapters", "list", "--store", "one", "--store", "two"),
        ("adapters", "combine", "a", "b", "--name", "one", "--name", "two"),
    ],
)
def test_an_option_with_one_value_is_not_given_twice(
    command: Callable[..., Outcome], arguments: tuple[str, ...]
) -> None:
    (name,) = {word.partition("=")[0] for word in arguments if word.startswith("--")}
    refused(command(*arguments), f"{name} was given more than once", "one value")


def test_options_that_take_several_values_and_flags_may_be_given_again(command: Callable[..., Outcome]) -> None:
    found = command("adapters", "list", "--store", ROOT / "adapters", "--json", "--json")
    assert found.code == 0, found.err
    found = command("eval", "--adapter", "nope", "--adapter", "neither")
    assert "more than once" not in found.err


def test_an_unknown_task_is_told_with_the_tasks_that_there_are(command: Callable[..., Outcome], tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    found = command("eval", "--task", "nope")
    refused(found, "the task 'nope'", "one of code_generation, question_answering, sentiment, ")
    assert "qwen" not in found.err and "did you mean another" not in found.err


def test_a_merge_does_not_go_into_the_store(command: Callable[..., Outcome], tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(ROOT / "adapters" / "sentiment", store / "sentiment")
    refused(command("merge", "sentiment", "--store", store, "--out", store / "merged"), "lies in the adapter store")
    assert not (store / "merged").exists()


def test_what_is_no_base_is_told_by_what_it_is(command: Callable[..., Outcome], run_yaml: Path, tmp_path: Path) -> None:
    refused(command("info", run_yaml), f"{run_yaml}: is a file, not a base")
    refused(command("info", ROOT / "adapters" / "sentiment"), "is an adapter, not a base", "adapters show")
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "export_report.json").write_text("{}")
    refused(command("export", "exported", "--to", "ollama", "--out", "again"), "is the folder of an export")


def test_train_prints_its_result(command: Callable[..., Outcome], run_yaml: Path, tmp_path: Path) -> None:
    changes = ("output_dir=run", "train.max_steps=2", "train.save_strategy=no")
    first = command("train", run_yaml, *changes, "--json")
    assert first.code == 0, first.err
    keys = {"output_dir", "steps", "train_loss", "eval_loss", "tokens_per_second", "supervised_tokens", "peak_bytes"}
    assert first.json.keys() >= keys | {"resumed_from"}
    assert (first.json["output_dir"], first.json["steps"], first.json["resumed_from"]) == ("run", 2, None)
    assert (tmp_path / "run" / "qlora_kit.json").is_file()
    plots = {path.name for path in (tmp_path / "run").glob("*.png")}
    assert plots == ({"loss.png", "learning_rate.png", "grad_norm.png", "row_lengths.png"} if can_plot() else set())
    refused(command("train", run_yaml, *changes), "run is occupied", "--resume", "--overwrite", "output_dir=")


def test_a_finished_run_says_so_when_resumed(command: Callable[..., Outcome], run_yaml: Path) -> None:
    every = ("train.eval_strategy=steps", "train.eval_steps=1", "train.save_strategy=steps", "train.save_steps=1")
    changes = ("output_dir=run", "train.max_steps=1", *every)
    first = command("train", run_yaml, *changes)
    assert first.code == 0 and "run: 1 step in " in first.out, first.err
    again = command("train", run_yaml, *changes, "--resume")
    assert again.code == 0 and "run: was already finished, 1 step; nothing was trained" in again.out, again.err
    assert "tokens/s" not in again.out
    again = command("train", run_yaml, *changes, "--overwrite")
    assert again.code == 0
    assert again.out.splitlines()[1] == "48 training rows; 0 rows dropped, cut or double"
    assert "qlora-kit adapters add run" in again.out


def test_the_store_from_add_to_delete(
    command: Callable[..., Outcome], trained_run: tuple[Path, TrainResult], random_base: Path
) -> None:
    folder = trained_run[0]
    assert command("adapters", "list", "--json").json == {"adapters": []}
    added = command("adapters", "add", folder, "--json").json
    assert added.keys() >= CARD
    assert (added["name"], added["task"], added["base_model"], added["r"]) == (
        "reviews",
        "sentiment",
        str(random_base),
        4,
    )
    refused(command("adapters", "add", folder), "the name is taken", "--replace")
    assert command("adapters", "add", folder, "--replace", "--json").code == 0
    assert command("adapters", "add", folder, "--name", "second", "--json").json["name"] == "second"
    assert command("adapters", "rename", "second", "third", "--json").json["name"] == "third"
    listed = command("adapters", "list", "--json").json["adapters"]
    assert [card["name"] for card in listed] == ["reviews", "third"]
    assert all(card.keys() >= CARD for card in listed)
    shown = command("adapters", "show", "third", "--json").json
    assert shown.keys() >= CARD
    assert shown["contract"]["base"]["id"] == str(random_base)
    assert shown["contract"]["name"] == "third"
    assert command("adapters", "delete", "third", "--json").json == {"deleted": "third", "adapters": []}
    refused(command("adapters", "show", "reviewz", "--json"), "reviewz", "did you mean reviews?")
    for verb in (("list",), ("show", "reviews")):
        plain = command("adapters", *verb)
        assert plain.code == 0
        assert "sentiment" in plain.out


def test_generate_prints_its_answer(
    command: Callable[..., Outcome], store: Path, monkeypatch: pytest.MonkeyPatch, random_base: Path
) -> None:
    answer = command("generate", "The soup is good.", "--adapter", "reviews", "--json").json
    assert answer.keys() >= {"text", "adapter", "finish_reason", "completion_tokens"}
    assert answer["adapter"] == "reviews"
    assert answer["completion_tokens"] <= 4  # the contract's limit
    longer = command("generate", "The soup is good.", "--base", random_base, "--max-new-tokens", 5, "--json").json
    assert longer["adapter"] is None
    assert longer["completion_tokens"] <= 5
    refused(command("generate", "--adapter", "reviews"), "neither a prompt nor --prompts")
    Path("prompts.jsonl").write_text('{"prompt": "The soup is good."}\n{"prompt": "Cold room."}\n', encoding="utf-8")
    many = command("generate", "--prompts", "prompts.jsonl", "--adapter", "reviews", "--json").json
    assert [row["prompt"] for row in many["answers"]] == ["The soup is good.", "Cold room."]
    assert {key: many["answers"][0][key] for key in answer} == answer
    Path("prompts.txt").write_text("The soup is good.\n\nCold room.\n", encoding="utf-8")
    plain = command("generate", "--prompts", "prompts.txt", "--adapter", "reviews").out.splitlines()
    assert [json.loads(line) for line in plain] == many["answers"]
    refused(command("generate", "Hi", "--prompts", "prompts.txt"), "both a prompt and --prompts")
    same = command("generate", "--prompts", "prompts.txt", "--out", "prompts.txt", "--overwrite")
    refused(same, "is the file of prompts")
    Path("bad.csv").write_text("question\nWhy?\n", encoding="utf-8")
    refused(command("generate", "--prompts", "bad.csv"), "bad.csv:2: the column 'prompt' is missing")
    refused(command("generate", "--prompts", "none.txt"), "the file does not exist")
    told = command("generate", "The soup is good.", "--adapter", "reviews", "--system", "Be brief.").err
    assert "system prompt: 'Be brief.'" in told
    assert "system prompt" not in command("generate", "Hello", "--base", random_base, "--system", "Be brief.").err
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    refused(command("generate", "-", "--adapter", "reviews"), "the prompt is empty")
    refused(command("generate", "Hello", "--temperature", "11"), "temperature is 11")
    greedy = command("generate", "The soup is good.", "--adapter", "reviews", "--top-p", 0.5, "--seed", 3)
    assert "--top-p, --seed: without effect at temperature 0" in greedy.err
    sampled = command("generate", "The soup is good.", "--adapter", "reviews", "--temperature", 1, "--seed", 3)
    assert "without effect" not in sampled.err


def test_generate_writes_a_file_and_goes_on_from_a_stopped_run(
    command: Callable[..., Outcome], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_kit.batch import AnswerLog

    asked = ("reviews", "base", "reviews:0.5")
    rows = [{"prompt": f"Is room {number} good?", "adapter": asked[number % 3]} for number in range(7)]
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = ("generate", "--prompts", "p.jsonl", "--adapter", "reviews", "--max-new-tokens", 3)
    printed = command(*run).out
    assert [json.loads(line)["adapter"] for line in printed.splitlines()][:3] == ["reviews", None, "reviews:0.5"]

    added = AnswerLog.add

    def interrupted(log: AnswerLog, row: dict[str, Any]) -> None:
        added(log, row)
        if log.done == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AnswerLog, "add", interrupted)
        assert command(*run, "--out", "out.jsonl").code == 130
    assert not Path("out.jsonl").exists()
    refused(command(*run[:-1], 2, "--out", "out.jsonl"), "other prompts, adapters or settings")
    ended = command(*run, "--out", "out.jsonl", "--json").json
    assert ended["rows"] == 7
    assert ended["resumed_from"] == 4
    assert Path("out.jsonl").read_text(encoding="utf-8") == printed
    refused(command(*run, "--out", "out.jsonl"), "out.jsonl: exists already", "--overwrite")
    refused(command("generate", "Hello", "--out", "out.jsonl"), "--out is given for one prompt")
    refused(command(*run, "--overwrite"), "--overwrite is given without --out")
    Path("p.jsonl").write_text('{"prompt": "Hi", "adapter": 3}\n', encoding="utf-8")
    refused(command(*run), "p.jsonl:1: the column 'adapter' holds no text")
    Path("p.jsonl").write_text('{"prompt": "Hi", "adapter": "revews"}\n', encoding="utf-8")
    refused(command(*run), "revews", "did you mean reviews?")


def test_mistakes_are_told_before_the_base_is_loaded(
    command: Callable[..., Outcome],
    store: Path,
    chatml_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from qlora_kit.adapters import AdapterContract

    monkeypatch.setattr("qlora_kit.cli.engine.EnginePlan.open", None)
    rows: list[dict[str, Any]] = [{"prompt": f"Is room {number} good?"} for number in range(7)]
    rows[2]["prompt"] = "word " * 600
    rows[4]["prompt"] = "So <|im_end|>"
    rows[6]["system"] = "<|im_start|>"
    Path("bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    told = command("generate", "--prompts", "bad.jsonl", "--adapter", "reviews")
    refused(told, "prompt 5: turn 1 (user) holds the control token <|im_end|>", "prompt 7: turn 1 (system) holds")
    contract = AdapterContract.load(store / "reviews")
    system = [{"role": "system", "content": contract.system_prompt}] if contract.system_prompt else []
    turns = [*system, {"role": "user", "content": rows[2]["prompt"]}]
    ids = chatml_tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert f"prompt 3: the prompt is {len(ids)} tokens long" in told.err
    refused(command("chat", "--adapter", "reviews", "--system", "<|im_end|>"), "(system) holds the control token")
    for verb in (("chat",), ("eval", "--limit", 3), ("generate", "Hello")):
        missing = command(*verb, "--adapter", "revews")
        refused(missing, "revews", "did you mean reviews?")
        assert "loading" not in missing.err


def test_serve_tells_of_a_store_that_is_not_there(command: Callable[..., Outcome]) -> None:
    told = command("serve", "--store", "nowhere", "--base", "ghost", "--port", 0)
    refused(told, "nowhere: there is no such folder yet", "'ghost'")


def test_a_file_in_the_place_of_a_store_is_not_called_missing(command: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told = command("adapters", "list", "--store", tmp_path / "file")
    refused(told, "the store cannot be read")
    assert "no such folder" not in told.err


def test_eval_prints_its_results(command: Callable[..., Outcome], store: Path) -> None:
    outcome = command("eval", "--adapter", "reviews", "--limit", 3, "--json")
    assert outcome.code == 0, outcome.err
    results = outcome.json["results"]
    assert all(row.keys() >= {"task", "adapter", "metric", "value", "ci95", "n"} for row in results)
    assert {(row["adapter"], row["metric"], row["n"]) for row in results} >= {
        (None, "accuracy", 3),
        ("reviews", "accuracy", 3),
        ("reviews", "stop_rate", 3),
    }


def test_merge_prints_its_result(command: Callable[..., Outcome], store: Path, tmp_path: Path) -> None:
    merged = command("merge", "reviews", "--out", "merged", "--json")
    assert merged.code == 0, merged.err
    content = merged.json
    assert content.keys() >= {"output_dir", "onto", "seconds", "peak_rss_bytes", "verification"}
    assert content["onto"] == "dequantized"
    verification = content["verification"]
    assert verification.keys() >= {"passed", "max_abs_logit_diff", "mean_abs_logit_diff", "top1_agreement", "kl"}
    assert verification["passed"] is True
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert "writing" in merged.err
    again = command("merge", "reviews", "--out", "merged", "--json")
    assert (again.code, again.json["already_there"]) == (0, True)
    assert "writing" not in again.err
    refused(command("merge", "reviews", "--out", "merged", "--onto", "original"), "merged", "--overwrite")


def test_merge_writes_the_trained_base_alone(command: Callable[..., Outcome], store: Path, tmp_path: Path) -> None:
    written = command("merge", "reviews", "--base-only", "--out", "trained", "--max-shard-size", "1MB", "--json")
    assert written.code == 0, written.err
    assert (written.json["kind"], written.json["adapter"], written.json["onto"]) == (
        "trained_base",
        None,
        "dequantized",
    )
    table = command("merge", "reviews", "--base-only", "--out", "trained", "--max-shard-size", "1 mb")
    assert "already there" in table.out
    assert "--overwrite" in table.out
    assert "trained base" in table.out
    refused(command("merge", "reviews", "--base", "trained", "--out", "merged"), "is the trained base of")
    refused(command("merge", "--base-only", "--onto", "original", "--out", "merged"), "the base itself")


@pytest.mark.usefixtures("no_model")
def test_merge_refuses_before_any_bar_is_drawn(command: Callable[..., Outcome], store: Path) -> None:
    for size in ("5", "0GB", "1KB", "900000GB", "-5GB", "many"):
        refused(command("merge", "reviews", "--out", "merged", "--max-shard-size", size), "--max-shard-size is")
    refused(command("merge", "--out", "merged"), "no adapter is given", "--base-only")
    (store / "reviews" / "adapter_model.safetensors").write_bytes(b"")
    outcome = command("merge", "reviews", "--out", "merged")
    refused(outcome, "adapter_model.safetensors: 0 bytes")
    assert "writing" not in outcome.err
    assert "━" not in outcome.err


# --- the user's mistakes, before a model is loaded ---


@pytest.mark.usefixtures("no_model")
def test_a_wrong_config_is_refused(command: Callable[..., Outcome], run_yaml: Path, tmp_path: Path) -> None:
    refused(command("train", run_yaml, "lora.rank=8"), "lora.rank is an unknown key")
    refused(command("train", run_yaml, "lora.r=many"), "lora.r is 'many'", "a whole number")
    refused(command("train", run_yaml, "task=sentimant"), "did you mean 'sentiment'?")
    refused(command("train", run_yaml, "model.base=nowhere"), "neither a folder nor a Hub id")
    refused(command("train", run_yaml, "learning_rate"), "section.key=value")
    refused(command("train", tmp_path / "missing.yaml"), "missing.yaml")
    (tmp_path / "broken.yaml").write_text("name: [\n")
    refused(command("data", tmp_path / "broken.yaml"), "broken.yaml:")
    both = command("train", run_yaml, "lora.rank=8", "train.learning_rate=-1")
    refused(both, "lora.rank", "train.learning_rate")
    assert both.err.count("error: ") == 2


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("verb", ["data", "train"])
@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ("rows.jsonl",)),
        (b"", ("rows.jsonl",)),
        (b"\n\n", ("rows.jsonl",)),
        (b'{"text": "Good.", "label": "positive"}\n{"text": "Bad.\n', ("rows.jsonl:2",)),
        (
            b'{"text": "Caf\xe9.", "label": "positive"}\n',
            ("rows.jsonl", "UTF-8"),
        ),
        (b'{"words": "Good."}\n', ("rows.jsonl",)),
    ],
    ids=["missing", "empty", "blank", "broken JSON", "wrong encoding", "unknown columns"],
)
def test_wrong_data_are_refused(
    command: Callable[..., Outcome],
    run_yaml: Path,
    tmp_path: Path,
    verb: str,
    content: bytes | None,
    parts: tuple[str, ...],
) -> None:
    if content is not None:
        (tmp_path / "rows.jsonl").write_bytes(content)
    refused(command(verb, run_yaml, "data.train=rows.jsonl", "output_dir=run"), *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_model")
def test_a_wrong_adapter_is_refused(
    command: Callable[..., Outcome], store: Path, random_base: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(random_base, other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1000:] = b"\x01" * 1000
    (other / "model.safetensors").write_bytes(bytes(weights))
    on_other = ("--adapter", "reviews", "--base", other)
    refused(command("generate", "Hello", *on_other), "fingerprint", f"--base {random_base}")
    refused(command("eval", *on_other), "fingerprint")
    refused(command("merge", "reviews", "--out", "merged", "--base", other), "fingerprint")
    assert not (tmp_path / "merged").exists()
    for verb in (("generate", "Hello", "--adapter"), ("eval", "--adapter"), ("merge", "--out", "merged")):
        refused(command(*verb, "reviewz"), "reviewz", "reviews")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("mine")
    refused(command("merge", "reviews", "--out", "merged"), "merged")


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("limit", [0, -1, 1.5, "8", True])
def test_a_contract_with_a_wrong_answer_limit_is_refused(
    command: Callable[..., Outcome], store: Path, limit: object
) -> None:
    rewrite(store / "reviews" / "qlora_kit.json", generation={"max_new_tokens": limit})
    refused(command("generate", "Hello", "--adapter", "reviews"), "generation is", "max_new_tokens")


@pytest.mark.usefixtures("no_model")
def test_unsound_adapters_are_refused_before_the_base_is_loaded(command: Callable[..., Outcome], store: Path) -> None:
    contract = store / "reviews" / "qlora_kit.json"
    quantization = json.loads(contract.read_text())["quantization"]
    rewrite(contract, quantization={**quantization, "bnb_4bit_quant_type": "nf5"})
    refused(command("generate", "Hello", "--adapter", "reviews"), "qlora_kit.json: quantization", "'nf5'")
    refused(command("merge", "reviews", "--out", "merged"), "qlora_kit.json: quantization", "'nf5'")
    rewrite(contract, quantization=quantization)
    weights = store / "reviews" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    refused(command("generate", "Hello", "--adapter", "reviews"), "adapter_model.safetensors")


def test_an_adapter_without_contract_needs_its_base(
    command: Callable[..., Outcome], store: Path, random_base: Path
) -> None:
    (store / "reviews" / "qlora_kit.json").unlink()
    refused(command("generate", "Hello", "--adapter", "reviews"), "no contract", "give --base (its configuration names")
    refused(command("eval", "--adapter", "reviews"), "--task NAME")
    answered = command("generate", "Hello", "--adapter", "reviews", "--base", random_base, "--max-new-tokens", 2)
    assert answered.code == 0
    assert answered.err.count("stop tokens cannot be checked") == 1


# --- text of others is shown as it is ---


@pytest.mark.parametrize("text", ["Answer in [json].", "Never [/x] nor [bold]."])
def test_markup_in_a_contract_is_plain_text(command: Callable[..., Outcome], store: Path, text: str) -> None:
    contract = store / "reviews" / "qlora_kit.json"
    base = json.loads(contract.read_text())["base"]
    rewrite(contract, system_prompt=text, base={**base, "id": text})
    shown = command("adapters", "show", "reviews")
    assert shown.code == 0
    assert shown.out.count(text) == 2
    assert text in command("adapters", "list").out


def test_markup_in_a_scorecard_is_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from qlora_kit.cli.evaluation import scorecard_table
    from qlora_kit.evaluation import Scorecard

    Console(width=80).print(scorecard_table(Scorecard(base="models/[/x]", split="test", pairs=())))
    assert "models/[/x], test rows" in capsys.readouterr().out


def test_markup_in_an_answer_of_the_demo_is_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    from types import SimpleNamespace

    from rich.console import Console

    from scripts.demo import answers_table

    class Parrot:
        def ask(self, prompt: str, **settings: object) -> SimpleNamespace:
            return SimpleNamespace(text="[json] [/x]")

    Console(width=120).print(answers_table(Parrot()))  # type: ignore[arg-type]
    assert capsys.readouterr().out.count("[json] [/x]") == 6


# --- commands that messages name ---


def test_messages_name_only_verbs_that_exist() -> None:
    from typer.main import get_command

    verbs = get_command(app).commands  # type: ignore[attr-defined]
    named: set[tuple[str, str]] = set()
    for path in (ROOT / "qlora_kit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named |= set(re.findall(r"\bqlora-kit ([a-z-]+)(?: ([a-z-]+))?", node.value))
    named = {(verb, after) for verb, after in named if verb not in PROSE}
    assert ("adapters", "list") in named
    unknown = [pair for pair in named if pair[0] not in verbs]
    unknown += [
        (verb, after)
        for verb, after in named
        if verb == "adapters" and after and after not in verbs["adapters"].commands
    ]
    assert unknown == []


# --- exit codes ---


def test_an_interruption_ends_with_130_and_a_bug_keeps_its_traceback(
    command: Callable[..., Outcome], run_yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(error: BaseException) -> Callable[..., None]:
        def check(*args: object, **options: object) -> None:
            raise error

        return check

    monkeypatch.setattr("qlora_kit.data_check.check", raises(KeyboardInterrupt()))
    interrupted = command("data", run_yaml)
    assert (interrupted.code, interrupted.err) == (130, "interrupted\n")
    monkeypatch.setattr("qlora_kit.data_check.check", raises(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main(["data", str(run_yaml)])


def test_a_guard_ends_with_3(command: Callable[..., Outcome], run_yaml: Path, tmp_path: Path) -> None:
    faults = ("train.learning_rate=1e30", "train.lr_scheduler_type=constant", "output_dir=run")
    outcome = command("train", run_yaml, *faults, "--json")
    assert outcome.code == 3
    assert "the loss became" in outcome.err
    assert outcome.out == ""
    assert not (tmp_path / "run").exists()


def test_a_wrong_option_ends_with_2(command: Callable[..., Outcome]) -> None:
    wrong = command("adapters", "list", "--jsn")
    assert wrong.code == 2
    assert "Usage: qlora-kit adapters list" in wrong.err
    assert command("no-such-verb").code == 2
    assert command("generate").code == 2


def test_help_names_every_verb(command: Callable[..., Outcome]) -> None:
    shown = command("--help")
    assert shown.code == 0
    for verb in ("data", "train", "eval", "generate", "merge", "adapters"):
        assert f" {verb} " in shown.out
    assert all(f" {info.name} " in shown.out for info in app.registered_commands)


# --- processes ---


@pytest.mark.parametrize(("script", "option"), [("train.py", "--resume"), ("merge.py", "--onto")])
def test_the_scripts_are_verbs(script: str, option: str) -> None:
    environment = {**os.environ, "COLUMNS": "120", "NO_COLOR": "1"}
    shown = subprocess.run(
        [sys.executable, str(ROOT / script), "--help"], check=True, capture_output=True, text=True, env=environment
    )
    assert option in shown.stdout
    assert script.removesuffix(".py") in shown.stdout


HEAVY = ("torch", "transformers", "peft", "datasets", "numpy")


@pytest.mark.parametrize(
    ("runs", "code", "heavy"),
    [
        (["--help", "adapters list --json", "adapters show reviews"], 0, HEAVY),
        (
            [
                "generate Hi --adapter ghost",
                "generate Hi --base ghost",
                "generate Hi --top-p 3",
                "generate --prompts /no/file",
                "generate --prompts prompts.txt --out adapters",
                "generate --prompts prompts.txt --out no/folder.jsonl",
                "generate --prompts prompts.txt --adapter ghost",
                "chat --adapter ghost",
                "chat --base ghost",
                "chat --min-p 3",
                "serve --base ghost",
                "serve --host 0.0.0.0",
                "eval --adapter ghost",
                "eval --adapter reviews --base ghost",
            ],
            2,
            ("torch", "transformers", "peft"),
        ),
    ],
)
def test_what_needs_no_model_never_imports_torch(
    store: Path, runs: list[str], code: int, heavy: tuple[str, ...]
) -> None:
    (store.parent / "prompts.txt").write_text("Hi\n", encoding="utf-8")
    program = (
        "import sys\nfrom qlora_kit.cli import main\n"
        f"for run in {runs!r}:\n    try:\n        main(run.split())\n"
        f"    except SystemExit as end:\n        assert (end.code or 0) == {code}, run\n"
        f"    heavy = set({heavy!r}) & set(sys.modules)\n    assert not heavy, (run, heavy)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=store.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_long_list_is_written_in_plain_lines(
    command: Callable[..., Outcome], trained_run: tuple[Path, TrainResult], tmp_path: Path
) -> None:
    store = tmp_path / "many"
    for number in range(120):
        shutil.copytree(
            trained_run[0], store / f"reviews-{number:03}", ignore=shutil.ignore_patterns("checkpoint*", "plots")
        )
    listed = command("adapters", "list", "--store", store)
    lines = listed.out.splitlines()
    assert lines[0] == f"{store}: 120 adapters"
    assert lines[1].split() == ["name", "task", "base", "model", "r", "size", "created"]
    assert [line.split()[:2] for line in lines[2:]] == [[f"reviews-{number:03}", "sentiment"] for number in range(120)]
    assert len({len(line) for line in lines[2:]}) == 1
    assert max(map(len, lines[1:])) <= 100
