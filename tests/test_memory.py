"""The planner's arithmetic against published figures, and its search against brute force."""

from __future__ import annotations

import itertools
import subprocess
from typing import Any

import pytest

from qlora_kit.architecture import Architecture, read_architecture
from qlora_kit.config import LoraSection
from qlora_kit.errors import ConfigError
from qlora_kit.memory import activations, parts
from qlora_kit.memory.cards import CARDS, GIB, Card, card_at_hand, find_card, known_card
from qlora_kit.memory.estimate import estimate
from qlora_kit.memory.files import file_bytes, merge_memory_bytes
from qlora_kit.memory.optimizers import optimizer_bytes, paged_bytes
from qlora_kit.memory.planner import (
    Plan,
    changes,
    fastest_that_fits,
    longest_length,
    make_plan,
)
from qlora_kit.memory.speed import operations_per_token, tokens_per_second
from qlora_kit.memory.workload import Workload, lora_pairs

GB = 1e9
# https://huggingface.co/Qwen/Qwen2.5-7B-Instruct/blob/main/config.json
QWEN_7B = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 32768,
    "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "vocab_size": 152064,
}  # fmt: skip


@pytest.fixture(scope="module")
def qwen() -> Architecture:
    return read_architecture(QWEN_7B, where="config.json")


def workload(architecture: Architecture, **changes: Any) -> Workload:
    """QLoRA of all linear layers with rank 16, one row of 2,048 tokens at a time, checkpointed."""
    base = Workload(
        architecture=architecture,
        layers=lora_pairs(architecture, LoraSection()),
        batch_size=1,
        length=2048,
        accumulation=8,
        checkpointing=True,
    )
    return base.with_(**changes)


# --- the figures of a 7B model ---


def test_static_parts_of_7b(qwen: Architecture) -> None:
    run = workload(qwen)
    linear = parts.linear_weights(qwen)
    assert linear == 6_525_288_448
    assert parts.linear_bytes(run) / linear == pytest.approx(0.5159, abs=2e-4)
    assert parts.linear_bytes(run.with_(double_quant=False)) / linear == pytest.approx(0.5625, abs=2e-4)
    assert parts.embedding_bytes(run) == 2 * 2 * 152_064 * 3584
    static = parts.linear_bytes(run) + parts.embedding_bytes(run) + parts.small_bytes(run)
    assert static == pytest.approx(5.55 * GB, rel=0.002)
    assert run.trainable == 40_370_176
    assert parts.adapter_bytes(run) == 4 * 40_370_176


def test_activations_of_7b(qwen: Architecture) -> None:
    run = workload(qwen)
    assert activations.checkpoint_bytes(run) == 2 * 3584 * 28 * 2048
    kept = activations.block_bytes(run, run.layers[1]) / run.tokens
    assert kept == pytest.approx(213_000, rel=0.01)
    assert activations.dequantized_bytes(run) == pytest.approx(0.136 * GB, rel=0.01)
    many = run.with_(length=8192)
    tile = activations.loss_bytes(many) - 8191 * 3584 * 6
    assert tile == pytest.approx(0.27 * GB, rel=0.01)  # however long the rows are


@pytest.mark.parametrize(
    ("length", "checkpointing", "least", "most"),
    [(2048, True, 7.6, 7.9), (8192, True, 10, 11), (2048, False, 18.5, 20)],
)
def test_peaks_of_7b(qwen: Architecture, length: int, checkpointing: bool, least: float, most: float) -> None:
    peak = estimate(workload(qwen, length=length, checkpointing=checkpointing)).peak_bytes
    assert least * GB <= peak <= most * GB


def test_speed_of_7b(qwen: Architecture) -> None:
    run = workload(qwen)
    linear, head, pairs, attention = 6.525e9, 5.45e8, 4.04e7, 2048 * 3584 * 28
    assert operations_per_token(run) == pytest.approx(6 * linear + 6 * head + 8 * pairs + 9 * attention, rel=1e-3)
    kept = run.with_(checkpointing=False)
    assert operations_per_token(kept) == pytest.approx(4 * linear + 6 * head + 6 * pairs + 7 * attention, rel=1e-3)
    for name, slow, fast in (("RTX 4090", 3500, 5100), ("RTX 3090", 1600, 2300)):
        assert tokens_per_second(run, CARDS[name]) == pytest.approx(slow, rel=0.06)
        assert tokens_per_second(kept, CARDS[name]) == pytest.approx(fast, rel=0.06)
    assert tokens_per_second(run, find_card("24GiB")) is None


# --- how parts depend on settings ---


def test_the_parts_add_up(qwen: Architecture) -> None:
    found = estimate(workload(qwen))
    assert sum(found.breakdown.values()) == found.peak_bytes
    outside = found.breakdown["allowance for fragmentation"] + found.breakdown["context and libraries"]
    assert found.allocated_bytes == found.peak_bytes - outside


def test_attention_takes_no_square_of_the_length_but_with_a_mask(qwen: Architecture) -> None:
    def per_token(length: int, **changes: Any) -> float:
        run = workload(qwen, length=length, **changes)
        return activations.block_bytes(run, run.layers[1]) / run.tokens

    assert per_token(8192) == pytest.approx(per_token(1024), rel=0.02)
    assert per_token(8192, packing=True) - per_token(1024, packing=True) == pytest.approx(2 * (8192 - 1024), rel=0.2)
    assert per_token(2048, packing=True, batch_size=4) > per_token(2048, batch_size=4)  # one sequence of all rows


def test_cards_without_the_flash_kernel_keep_the_probabilities_of_grouped_heads(qwen: Architecture) -> None:
    run = workload(qwen, flash=False, checkpointing=False)
    fast = workload(qwen, checkpointing=False)
    difference = activations.block_bytes(run, run.layers[1]) - activations.block_bytes(fast, fast.layers[1])
    assert difference == 4 * 28 * 2048**2 + 12 * 3584 * 2048
    assert not activations.plain_attention(run.with_(batch_size=2))  # padded rows: heads are repeated, a kernel fits
    assert "length x length" in " ".join(estimate(run).notes)


def test_optimizers_of_7b(qwen: Architecture) -> None:
    def state(optim: str) -> float:
        return optimizer_bytes(workload(qwen, optim=optim)) / 40_370_176

    assert state("adamw_torch") == pytest.approx(8, rel=1e-4)
    assert state("adamw_8bit") == pytest.approx(2 + 8 / 256, rel=1e-3)
    assert state("sgd") == 0
    assert state("adafactor") < 0.4
    paged = workload(qwen, optim="paged_adamw_8bit")
    assert optimizer_bytes(paged) + paged_bytes(paged) == optimizer_bytes(paged.with_(optim="adamw_8bit"))
    assert paged_bytes(paged) > optimizer_bytes(paged)
    assert paged_bytes(paged.with_(device="cpu")) == 0
    assert "stable_adamw is counted as adamw_torch" in " ".join(estimate(paged.with_(optim="stable_adamw")).notes)


def test_a_large_validation_batch_can_be_the_peak(qwen: Architecture) -> None:
    alone = estimate(workload(qwen))
    both = estimate(workload(qwen, eval_batch_size=64))
    assert both.peak_bytes > alone.peak_bytes
    assert "per_device_eval_batch_size" in " ".join(both.notes)
    assert estimate(workload(qwen, eval_batch_size=64, eval_length=16)).peak_bytes == alone.peak_bytes


def test_target_modules_follow_pefts_rules(qwen: Architecture) -> None:
    pairs = lora_pairs(qwen, LoraSection(target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 4}))
    assert [(pair.module, pair.r) for pair in pairs[5]] == [("q_proj", 16), ("down_proj", 4)]
    some = lora_pairs(qwen, LoraSection(target_modules=r".*layers\.[01]\.mlp\..*", exclude_modules=["up_proj"]))
    assert [len(block) for block in some] == [2, 2] + [0] * 26


def test_files_and_merge(qwen: Architecture) -> None:
    sizes = file_bytes(workload(qwen))
    assert sizes["merged"] == 2 * 7_615_616_512
    assert sizes["bnb_4bit"] == pytest.approx(5.55 * GB, rel=0.002)
    assert sizes["checkpoint"] == pytest.approx(3 * sizes["adapter"], rel=1e-3)
    assert merge_memory_bytes(workload(qwen))["verify"] == pytest.approx(37 * GIB, rel=0.01)


# --- the search ---


def test_the_longest_length_is_where_it_stops_fitting(qwen: Architecture) -> None:
    run = workload(qwen)
    longest = longest_length(run, 12 * GIB)
    assert longest % 64 == 0
    assert estimate(run.with_(length=longest)).needed_bytes <= 12 * GIB
    assert estimate(run.with_(length=longest + 64)).needed_bytes > 12 * GIB
    assert longest_length(run, 5 * GIB) == 0
    assert longest_length(run, 200 * GIB) == qwen.context_length


@pytest.mark.parametrize("gib", [6, 7, 8, 10, 16, 24, 48, 80])
@pytest.mark.parametrize("movable", [False, True])
def test_the_fastest_is_what_trying_everything_finds(gib: int, movable: bool, qwen: Architecture) -> None:
    card = Card("a card", gib * GIB, 100, 1000)
    run = workload(qwen, batch_size=2, accumulation=4, embedding_is_movable=movable)
    best = fastest_that_fits(run, card, optimizers=("adamw_8bit",))
    tried = [
        run.with_(
            batch_size=rows,
            accumulation=8 // rows,
            checkpointing=layers > 0,
            checkpointed_layers=layers if 0 < layers < 28 else None,
            optim=optim,
            embedding_on_host=on_host,
        )
        for rows, layers, optim, on_host in itertools.product(
            (1, 2, 4, 8), range(29), ("adamw_torch", "adamw_8bit"), (False, movable)
        )
    ]
    speeds = [tokens_per_second(one, card) or 0 for one in tried if estimate(one).needed_bytes <= card.free_bytes]
    if best is None:
        assert not speeds
        return
    assert estimate(best).needed_bytes <= card.free_bytes
    assert best.effective_batch == 8
    assert (tokens_per_second(best, card) or 0) >= 0.98 * max(speeds)


def test_what_does_not_fit_gets_settings_that_do(qwen: Architecture) -> None:
    card = find_card("RTX 4090")
    found = make_plan(workload(qwen, checkpointing=False, batch_size=8, accumulation=1, eval_batch_size=8), card)
    assert not found.fits
    first = found.suggestions[0]
    assert first.peak_bytes <= card.free_bytes
    assert first.workload.effective_batch == 8
    assert first.changes == changes(found.workload, first.workload)
    assert first.yaml_lines[0] == "train:"
    assert f"  per_device_train_batch_size: {first.workload.batch_size}" in first.yaml_lines


def test_a_length_that_never_fits_gets_a_shorter_one(qwen: Architecture) -> None:
    found = make_plan(workload(qwen, length=32_768), find_card("12GiB"))
    (only,) = found.suggestions
    assert 0 < only.changes["max_length"] < 32_768
    assert only.peak_bytes <= 12 * GIB


def test_a_base_that_never_fits_gets_nothing(qwen: Architecture) -> None:
    found = make_plan(workload(qwen), find_card("4GiB"))
    assert (found.fits, found.longest_max_length, found.suggestions) == (False, 0, ())
    assert found.uncheckpointed_layers is None


def test_where_nothing_fits_the_least_is_told_and_a_card_that_holds_it(qwen: Architecture) -> None:
    large = workload(qwen, batch_size=8, accumulation=1, checkpointing=False, eval_batch_size=8)
    found = make_plan(large, find_card("6GiB"))
    assert found.suggestions == ()
    assert found.smallest is not None
    assert dict(found.smallest.changes) == {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "per_device_eval_batch_size": 1,
        "gradient_checkpointing": True,
        "optim": "paged_adamw_8bit",
    }
    needed = estimate(found.smallest.workload).needed_bytes
    assert found.card.free_bytes < found.least_bytes < needed
    card = found.smallest_card
    assert card is not None
    assert card.memory_bytes >= needed
    assert not any(needed <= other.memory_bytes < card.memory_bytes for other in CARDS.values())
    assert make_plan(found.smallest.workload, card).fits
    assert make_plan(large, find_card("12GiB")).smallest is None


def test_a_margin_must_be_free_beside_the_peak(qwen: Architecture) -> None:
    run = workload(qwen)
    found = estimate(run)
    assert found.margin_bytes == found.peak_bytes // 20
    assert found.needed_bytes == found.peak_bytes + found.margin_bytes
    assert make_plan(run, Card("just enough", found.needed_bytes)).fits
    assert not make_plan(run, Card("a byte less", found.needed_bytes - 1)).fits


def test_a_split_base_takes_its_share_and_two_layers(qwen: Architecture) -> None:
    run = workload(qwen)
    whole = parts.linear_bytes(run)
    assert parts.held_linear_bytes(run) == whole
    for processes in (2, 4, 8):
        held = parts.held_linear_bytes(run.with_(shards=processes))
        assert held == pytest.approx(whole / processes + 2 * whole / 28, rel=1e-6)
        saved = estimate(run).allocated_bytes - estimate(run.with_(shards=processes)).allocated_bytes
        assert saved == whole - held


def test_an_embedding_on_the_host_takes_none_of_the_card(qwen: Architecture) -> None:
    run = workload(qwen, embedding_is_movable=True)
    moved = run.with_(embedding_on_host=True)
    rows = 2 * 152_064 * 3584
    assert estimate(run).allocated_bytes - estimate(moved).allocated_bytes == rows
    assert dict(estimate(moved).on_host) == {"embedding on the host": rows}
    assert file_bytes(moved) == file_bytes(run)
    assert tokens_per_second(moved, CARDS["RTX 4090"]) == pytest.approx(
        tokens_per_second(run, CARDS["RTX 4090"]), rel=0.01
    )
    cpu = moved.with_(device="cpu")
    assert estimate(cpu) == estimate(cpu.with_(embedding_on_host=False))
    assert fastest_that_fits(cpu.with_(embedding_on_host=False), Card("a card", 80 * GIB)).embedding_on_host is False
    short = estimate(moved.with_(length=1, optim="sgd"))  # it is on the card while the base is loaded
    everything = estimate(run.with_(length=1, optim="sgd")).breakdown
    loading = sum(everything[part] for part in ("linear layers", "embedding and head", "norms and biases"))
    assert short.allocated_bytes == loading


# --- checkpointing of some layers ---


def test_a_checkpointed_layer_trades_memory_for_operations(qwen: Architecture) -> None:
    runs = [workload(qwen, checkpointing=False), *(workload(qwen, checkpointed_layers=k) for k in range(1, 29))]
    kept = [activations.saved_bytes(run) for run in runs]
    block = activations.block_bytes(runs[0], runs[0].layers[5])
    saving = block - 2 * 3584 * 2048
    assert [before - after for before, after in itertools.pairwise(kept[1:])] == [saving] * 27
    steps = [operations_per_token(after) - operations_per_token(run) for run, after in itertools.pairwise(runs)]
    assert steps == pytest.approx([steps[0]] * 28)
    assert estimate(runs[28]) == estimate(workload(qwen))
    assert operations_per_token(runs[28]) == operations_per_token(workload(qwen))
    peaks = [estimate(run).peak_bytes for run in runs]
    assert peaks[:-1] == sorted(peaks[:-1], reverse=True)


@pytest.mark.parametrize("gib", [8, 10, 12, 16, 18])
def test_as_few_layers_as_fit_are_checkpointed(gib: int, qwen: Architecture) -> None:
    run = workload(qwen)
    fitting = [
        layers for layers in range(1, 29) if estimate(run.with_(checkpointed_layers=layers)).needed_bytes <= gib * GIB
    ]
    assert make_plan(run, Card("a card", gib * GIB)).uncheckpointed_layers == 28 - min(fitting)
    assert 1 < min(fitting) <= 28
    assert make_plan(run, find_card("H200")).uncheckpointed_layers == 28


def test_what_is_as_good_as_any_is_left_alone(qwen: Architecture) -> None:
    found: Plan = make_plan(workload(qwen, batch_size=8, accumulation=1, checkpointing=False), find_card("H200"))
    assert found.fits
    assert not any("fastest" in suggestion.why for suggestion in found.suggestions)


# --- cards ---


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("RTX 4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("3090", "RTX 3090"),
        ("NVIDIA GeForce RTX 3090 Ti", "RTX 3090 Ti"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("Tesla T4", "Tesla T4"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
    ],
)
def test_cards_are_found_by_the_names_in_use(text: str, name: str) -> None:
    assert find_card(text) is CARDS[name]


@pytest.mark.parametrize("text", ["RTX 4090 Laptop", "H100 NVL", "A100", "RTX 4070 Super", ""])
def test_another_card_is_not_taken_for_one_of_the_table(text: str) -> None:
    assert known_card(text) is None


@pytest.mark.parametrize(("text", "size"), [("24GiB", 24 * GIB), ("24 gb", 24 * 10**9), ("11264MiB", 11 * GIB)])
def test_a_size_is_a_card(text: str, size: int) -> None:
    assert find_card(text).free_bytes == size


@pytest.mark.parametrize("text", ["24", "0GiB", "RTX 4900", "-3GiB"])
def test_no_card_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"24GiB(.|\n)*do: "):
        find_card(text)


def test_the_card_at_hand_is_what_nvidia_smi_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(command: tuple[str, ...], **options: Any) -> subprocess.CompletedProcess[str]:
        assert command[0] == "nvidia-smi"
        assert options["timeout"] > 0
        return subprocess.CompletedProcess(command, 0, "NVIDIA GeForce RTX 3060, 12288, 1024\nNVIDIA L4, 1, 1\n")

    monkeypatch.setattr(subprocess, "run", answer)
    card = card_at_hand()
    assert (card.name, card.free_bytes, card.tflops) == ("NVIDIA GeForce RTX 3060", 11 * GIB, 25.5)


@pytest.mark.parametrize("trouble", [FileNotFoundError(), subprocess.TimeoutExpired("nvidia-smi", 10), None])
def test_without_a_gpu_one_is_asked_for(trouble: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(command: tuple[str, ...], **options: Any) -> subprocess.CompletedProcess[str]:
        if trouble is not None:
            raise trouble
        return subprocess.CompletedProcess(command, 0, "")

    monkeypatch.setattr(subprocess, "run", answer)
    with pytest.raises(ConfigError, match="--gpu 24GiB"):
        card_at_hand()
