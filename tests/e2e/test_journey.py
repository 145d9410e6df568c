"""The whole job on the shipped base: data, train, resume, publish, swap, evaluate, merge, load elsewhere."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from qlora_kit.cli import main
from qlora_kit.formats import Message

ROOT = Path(__file__).resolve().parents[2]
ROWS = 96


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own with a small sentiment data set and its config."""
    monkeypatch.chdir(tmp_path)
    for split, rows in (("train", ROWS), ("validation", 24), ("test", 24)):
        with (ROOT / f"datasets/sentiment/{split}.csv").open(encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file))[: rows + 1]
        with (tmp_path / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(lines)
    (tmp_path / "config.yaml").write_text(
        "name: mine\ntask: sentiment\n"
        "data: {train: train.csv, validation: validation.csv, test: test.csv}\n"
        "lora: {r: 8, lora_dropout: 0.05}\n"
        "train: {max_steps: 8, per_device_train_batch_size: 8, learning_rate: 3.0e-3, max_length: 256,\n"
        "        eval_strategy: steps, eval_steps: 4, save_strategy: steps, save_steps: 4, logging_steps: 1}\n"
    )
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    """A command that must succeed; its ``--json`` object."""
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--json"])
    output = capsys.readouterr()
    assert end.value.code in (None, 0), output.err
    return json.loads(output.out.splitlines()[-1])


def test_from_data_to_merged_model(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qlora_kit import Engine

    data = run(capsys, "data", "config.yaml")
    assert (data["rows"], data["kept"], data["dropped"]) == (ROWS + 48, ROWS + 48, 0)

    whole = run(capsys, "train", "config.yaml")
    assert whole["steps"] == 8
    trained = Path("runs/mine/adapter_model.safetensors").read_bytes()

    # The same run, cut after its first checkpoint and resumed, ends in the same bytes.
    for name in ("adapter_model.safetensors", "qlora_kit.json"):
        Path("runs/mine", name).unlink()
    for path in sorted(Path("runs/mine/checkpoint-8").iterdir()):
        path.unlink()
    resumed = run(capsys, "train", "config.yaml", "--resume")
    assert str(resumed["resumed_from"]).endswith("checkpoint-4")
    assert Path("runs/mine/adapter_model.safetensors").read_bytes() == trained

    card = run(capsys, "adapters", "add", "runs/mine", "--store", "store")
    assert (card["name"], card["task"], card["base_model"], card["r"]) == ("mine", "sentiment", "tiny", 8)
    listed = run(capsys, "adapters", "list", "--store", "store")
    assert [entry["name"] for entry in listed["adapters"]] == ["mine"]

    scores = run(capsys, "eval", "--adapter", "mine", "--store", "store")
    assert {(row["adapter"], row["metric"]) for row in scores["results"]} == {
        (adapter, metric) for adapter in (None, "mine") for metric in ("accuracy", "macro_f1", "stop_rate")
    }
    assert all(row["n"] == 24 for row in scores["results"])

    merged = run(capsys, "merge", "mine", "--out", "merged/mine", "--store", "store")
    assert merged["verification"]["passed"] is True
    assert merged["onto"] == "dequantized"

    # What plain transformers reads from the merged folder answers as base + adapter does.
    engine = Engine("tiny", store=Path("store"))
    engine.load("mine")
    conversation = [Message("system", "Is this review positive, negative or neutral?"), Message("user", "It was good.")]
    ours = engine.generate([conversation], adapter="mine")[0]
    tokenizer = AutoTokenizer.from_pretrained("merged/mine")
    model = AutoModelForCausalLM.from_pretrained("merged/mine", dtype=torch.float32)
    ids = tokenizer.apply_chat_template(
        [vars(turn) for turn in conversation], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**ids, max_new_tokens=8, do_sample=False)
    text = tokenizer.decode(output[0, ids["input_ids"].shape[1] :])
    assert text.split("<|im_end|>")[0] == ours.text


def test_generate_answers_with_base_and_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "The cats are under the table."
    store = str(ROOT / "adapters")
    base = run(capsys, "generate", prompt, "--max-new-tokens", "12")
    adapter = run(capsys, "generate", prompt, "--adapter", "translation", "--store", store)
    again = run(capsys, "generate", prompt, "--max-new-tokens", "12")
    assert base == again
    assert adapter["adapter"] == "translation"
    assert adapter["text"] == "Les chats sont sous la table."
    assert adapter["finish_reason"] == "stop"
    assert base["text"] != adapter["text"]
