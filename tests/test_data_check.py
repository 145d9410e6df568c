"""What `qlora-kit data` tells of a config's data: lengths, previews, where answers end, and what training takes."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from qlora_kit import measured_speed
from qlora_kit.base_files import BaseRef
from qlora_kit.config import load_config
from qlora_kit.data.chat import render_prompt
from qlora_kit.data.encoding import encode_conversation
from qlora_kit.data.ledger import Ledger
from qlora_kit.data.lengths import BINS, summarise
from qlora_kit.data.preview import spans
from qlora_kit.data.stop_proof import prove_stops
from qlora_kit.data_check import check
from qlora_kit.formats import Message
from qlora_kit.training.stop_rate import last_prompt, stop_rate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from qlora_kit.training import TrainResult

TURNS = (
    Message("system", "Rules."),
    Message("user", "Hello\nworld"),
    Message("assistant", "nice"),
    Message("user", "today"),
    Message("assistant", "is it not"),
)


@pytest.mark.parametrize("seed", range(5))
def test_lengths_agree_with_numpy(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 50 * (seed + 1), size=201)
    found = summarise(Counter(lengths.tolist()))
    assert found is not None
    assert found.median == np.percentile(lengths, 50, method="inverted_cdf")
    assert found.p95 == np.percentile(lengths, 95, method="inverted_cdf")
    assert found.longest == lengths.max()
    assert 1 <= len(found.bins) <= BINS
    for part in found.bins:
        assert part.rows == ((lengths >= part.low) & (lengths <= part.high)).sum()
    assert sum(part.rows for part in found.bins) == 201


def test_no_rows_have_no_lengths() -> None:
    assert summarise({}) is None
    one = summarise({7: 3})
    assert one is not None
    assert [(part.low, part.high, part.rows) for part in one.bins] == [(7, 7, 3)]


def test_spans_are_the_row_with_its_answers_marked(chatml_tokenizer: PreTrainedTokenizerFast) -> None:
    row = encode_conversation(TURNS, chatml_tokenizer, loss_on="all_assistant")
    found = spans(row.input_ids, row.labels, chatml_tokenizer)
    assert "".join(span.text for span in found) == chatml_tokenizer.decode(row.input_ids)
    assert [span.text for span in found if span.supervised] == ["nice", "<|im_end|>", "is it not", "<|im_end|>"]
    assert {span.text for span in found if span.control} == {"<|im_start|>", "<|im_end|>"}


def test_the_last_prompt_is_what_generation_sees(chatml_tokenizer: PreTrainedTokenizerFast) -> None:
    row = encode_conversation(TURNS, chatml_tokenizer, loss_on="all_assistant")
    assert last_prompt(row.input_ids, row.labels) == render_prompt(TURNS[:-1], chatml_tokenizer)
    assert last_prompt([1, 2], [1, 2]) == []


def test_the_stop_rate_counts_answers_that_end(random_model: PreTrainedModel) -> None:
    """Against transformers' own greedy decoding, one prompt at a time."""
    from datasets import Dataset

    prompts = [[7, 3, 9, 20 + number] for number in range(12)]
    rows = Dataset.from_dict({"input_ids": [[*ids, 5] for ids in prompts], "labels": [[-100] * 4 + [5]] * 12})
    greedy = [
        random_model.generate(
            torch.tensor([ids]), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, 4:].tolist()
        for ids in prompts
    ]
    stop = Counter(token for answer in greedy for token in answer).most_common(1)[0][0]
    expected = sum(stop in answer for answer in greedy) / len(prompts)
    found = stop_rate(random_model, rows, stop_token_ids=[stop], pad_token_id=0, max_new_tokens=6)
    assert found == expected
    assert 0 < expected <= 1


def test_training_tells_the_stop_rate(trained_run: tuple[Path, TrainResult]) -> None:
    folder, result = trained_run
    assert result.stop_rate is not None
    assert 0 <= result.stop_rate <= 1
    assert json.loads((folder / "metrics.json").read_text())["stop_rate"] == result.stop_rate
    assert json.loads((folder / "qlora_kit.json").read_text())["metrics"]["stop_rate"] == result.stop_rate


def test_settings_of_the_base_that_stop_elsewhere_are_told(
    random_base: Path, chatml_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text((random_base / "config.json").read_text())
    ledger = Ledger()
    ledger.lengths["train"].update([5, 6])
    ledger.stopped_rows["train"] = 2
    for eos, told in ((0, True), ([0, chatml_tokenizer.convert_tokens_to_ids("<|im_end|>")], False)):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        proof = prove_stops(BaseRef("x", tmp_path), chatml_tokenizer, ledger)
        assert (proof.token, proof.supervised_rows, proof.cut_rows) == ("<|im_end|>", 2, 0)
        assert any("generation_config.json stops at 0" in note for note in proof.notes) == told
    ledger.stopped_rows["train"] = 1
    assert "1 answers were cut" in prove_stops(BaseRef("x", tmp_path), chatml_tokenizer, ledger).notes[0]


def test_the_estimate_is_what_training_does(run_yaml: Path, trained_run: tuple[Path, TrainResult]) -> None:
    found = check(load_config(run_yaml), preview=2)
    assert found.estimate is not None
    assert found.estimate.steps == trained_run[1].steps == 12
    assert found.estimate.tokens == 2 * found.data.ledger.total_tokens("train")
    assert len(found.previews) == 2
    assert found.stops.supervised_rows == 63
    content = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert content.keys() >= {
        *("rows", "kept", "dropped", "truncated", "duplicates", "leaked", "supervised_tokens", "total_tokens"),
        *("problems", "splits", "lengths", "stops", "estimate", "parts", "previews"),
    }


@pytest.mark.parametrize("overrides", [(), ("train.gradient_accumulation_steps=4",), ("train.max_steps=5",)])
def test_steps_agree_with_the_trainers_own_count(run_yaml: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    config = load_config(run_yaml, ["train.num_train_epochs=1.5", "train.per_device_train_batch_size=5", *overrides])
    found = check(config).estimate
    assert found is not None
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=1.5,
        per_device_train_batch_size=5,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        max_steps=config.train.model_dump().get("max_steps", -1),
        use_cpu=True,
        report_to="none",
    )
    trainer = Trainer(torch.nn.Linear(1, 1), arguments, train_dataset=Dataset.from_dict({"input": list(range(48))}))
    assert found.steps == trainer.set_initial_training_values(arguments, trainer.get_train_dataloader())[-1]


def test_the_speed_of_the_last_run_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "cache"))
    device = torch.device("cpu")
    assert measured_speed.last_speed("tiny", device) is None
    measured_speed.note_speed("tiny", device, 1000.5)
    measured_speed.note_speed("other", device, 3.0)
    assert measured_speed.last_speed("tiny", device) == 1000.5
    (tmp_path / "cache" / measured_speed.SPEED_FILE).write_text("[")
    assert measured_speed.last_speed("tiny", device) is None
    monkeypatch.setenv("QLORA_KIT_CACHE", "/dev/null/none")
    measured_speed.note_speed("tiny", device, 1.0)
    assert math.isfinite(measured_speed.last_speed("tiny", device) or 0.0)
