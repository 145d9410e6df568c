"""What a config's ``target`` refuses: by key, all at once, before anything is read or trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qlora_kit.base_files import BaseRef
from qlora_kit.config import load_config
from qlora_kit.config.serving_targets import LIMITS, vllm_max_rank
from qlora_kit.errors import ConfigError
from qlora_kit.training.serving import require_servable

if TYPE_CHECKING:
    from qlora_kit.training import TrainResult

SMALL = "name: run\ntask: sentiment\ndata:\n  train: rows.csv\n"


def load(folder: Path, text: str, *overrides: str) -> Any:
    path = folder / "run.yaml"
    path.write_text(SMALL + text, encoding="utf-8")
    return load_config(path, overrides)


@pytest.mark.parametrize(
    ("lora", "target", "refused"),
    [
        ("use_dora: true", "vllm", ["lora.use_dora is true, and vLLM has no DoRA"]),
        ("use_dora: true", "llama.cpp", ["lora.use_dora is true, and llama.cpp has no DoRA"]),
        ("use_dora: true", "ollama", ["lora.use_dora is true, and Ollama has no DoRA"]),
        ("modules_to_save: [lm_head]", "vllm", ["lora.modules_to_save is ['lm_head']"]),
        ("modules_to_save: lm_head", "ollama", ["lora.modules_to_save is ['lm_head']"]),
        ("trainable_token_indices: [5]", "vllm", ["lora.trainable_token_indices is [5]"]),
        ("rank_pattern: {q_proj: 4}", "llama.cpp", ["lora.rank_pattern is {'q_proj': 4}"]),
        ("alpha_pattern: {q_proj: 4}", "ollama", ["lora.alpha_pattern is {'q_proj': 4}"]),
        ("r: 513", "vllm", ["lora.r asks for rank 513, and vLLM serves at most 512"]),
        ("rank_pattern: {q_proj: 600}", "vllm", ["lora.rank_pattern asks for rank 600"]),
        ("{use_dora: true, r: 600, alpha_pattern: {q_proj: 2}}", "[vllm, llama.cpp]",
         ["lora.use_dora is true, and vLLM", "lora.r asks", "lora.use_dora is true, and llama", "lora.alpha_pattern"]),
        # what they can serve
        ("{r: 512, use_rslora: true, rank_pattern: {q_proj: 4}, alpha_pattern: {q_proj: 4}}", "vllm", []),
        ("{r: 1024, use_rslora: true}", "[llama.cpp, ollama]", []),
        ("{use_dora: true, modules_to_save: [lm_head]}", "[]", []),
    ],
)  # fmt: skip
def test_what_a_target_cannot_serve_is_refused_by_key(
    lora: str, target: str, refused: list[str], tmp_path: Path
) -> None:
    section = lora if lora.startswith("{") else f"{{{lora}}}"
    text = f"lora: {section}\ntarget: {target}\n"
    if not refused:
        assert set(load(tmp_path, text).target) <= LIMITS.keys()
        return
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    faults = [str(fault) for fault in caught.value.faults]
    assert len(faults) == len(refused)
    for start, fault in zip(refused, faults, strict=True):
        assert f"run.yaml:5: {start}" in fault
        assert "out of target" in fault or "lower it" in fault


@pytest.mark.parametrize(
    ("value", "advice"), [("vlm", "vllm"), ("[vllm, lama.cpp]", "one or more of"), ("3", "a text")]
)
def test_an_unknown_target_is_told(value: str, advice: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="target") as caught:
        load(tmp_path, f"target: {value}\n")
    assert advice in str(caught.value)


def test_targets_are_kept_in_the_resolved_config(tmp_path: Path) -> None:
    config = load(tmp_path, "", "target=[vllm, ollama]")
    assert config.target == ("vllm", "ollama")
    (tmp_path / "again.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(tmp_path / "again.yaml").target == config.target


@pytest.mark.parametrize(("rank", "expected"), [(1, 1), (2, 8), (8, 8), (9, 16), (65, 128), (257, 320), (512, 512)])
def test_the_smallest_rank_that_vllm_takes(rank: int, expected: int) -> None:
    assert vllm_max_rank(rank) == expected


@pytest.mark.parametrize(
    ("family", "lora", "target", "refused"),
    [
        ("qwen2", "{target_modules: [q_proj, lm_head]}", "vllm", "lora.target_modules adapts lm_head"),
        ("mistral", "{target_modules: '.*(q_proj|lm_head)'}", "vllm", "lora.target_modules adapts lm_head"),
        ("llama", "{target_modules: [q_proj, lm_head]}", "vllm", None),
        ("qwen3", "{target_modules: [lm_head]}", "vllm", None),
        ("qwen2", "{}", "[vllm, llama.cpp, ollama]", None),
        ("gpt_neox", "{}", "llama.cpp", "target names llama.cpp, and bases of the type gpt_neox"),
        ("gpt_neox", "{}", "ollama", "target names ollama, and bases of the type gpt_neox"),
        ("gpt_neox", "{}", "vllm", None),
    ],
)
def test_what_only_the_base_can_tell(family: str, lora: str, target: str, refused: str | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(f'{{"model_type": "{family}"}}')
    config, ref = load(tmp_path, f"lora: {lora}\ntarget: {target}\n"), BaseRef("base", tmp_path)
    if refused is None:
        require_servable(config, ref)
        return
    with pytest.raises(ConfigError) as caught:
        require_servable(config, ref)
    assert str(caught.value).startswith(refused)


def test_training_refuses_before_the_data_are_read(start_run: Callable[..., TrainResult], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="adapts lm_head"):
        start_run("target=vllm", "lora.target_modules=[q_proj, lm_head]", "data.train=nowhere.jsonl")
    assert not (tmp_path / "run").exists()
