"""Run folders of the smallest adapter there is, and names that no adapter may have; made without torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from qlora_kit.adapters import AdapterContract, BaseIdentity

CONTRACT = AdapterContract(
    base=BaseIdentity("Qwen/Qwen2.5-7B-Instruct", "abc", "sampled-1:11"),
    quantization={"load_in_4bit": True},
    chat_template_sha256="22",
    system_prompt=None,
    stop_token_ids=(2, 0),
    generation={},
    task="sentiment",
    metric_names=("accuracy",),
    data=(),
    config_sha256="44",
    versions={},
    created="2026-01-02T03:04:05+00:00",
    kit_version="0.1.0",
    metrics={"accuracy": 0.95},
)
SETTINGS = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "base_model_name_or_path": "some/base",
}


def make_run(folder: Path, *, contract: AdapterContract | None = CONTRACT, value: float = 1.0) -> Path:
    """A run folder: an adapter's own files among others that training leaves."""
    folder.mkdir(parents=True)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {"A": np.full((2, 4), value, np.float32), "B": np.ones((4, 2), np.float32)}
    save_file(
        {f"{prefix}.lora_{key}.weight": array for key, array in factors.items()}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS))
    (folder / "config.yaml").write_text("name: x\n")
    (folder / "README.md").write_text("card\n")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "training_args.bin").write_bytes(b"1")
    (folder / "checkpoint-10").mkdir()
    if contract is not None:
        contract.save(folder)
    return folder


def value_of(folder: Path) -> float:
    """What ``make_run`` filled lora_A with."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return float(next(array for name, array in tensors.items() if "lora_A" in name)[0, 0])


BAD_NAMES = ["", ".", "..", "-a", "_a", ".a", "a.b", "a/b", "../a", "/a", "a\\b", "a b", " a", "a ", "a\n", "x" * 65]
BAD_NAMES += [
    "é",
    "ａ",
    "a\x00",
    "a:b",
    "a*",
    "~",
    "~root",
    "$HOME",
    "a;b",
    "a|b",
    "%2e%2e",
    "a@b",
    "C:",
    "a,b",
    "'a'",
    "١",
]

# Given to a verb, neither a name in the store nor a folder that there is.
BAD_PATHS = [*BAD_NAMES, "x" * 300, "x" * 5000, "x" * 1_000_000, "a/../b", "../adapters/none", "a/none", "./", "//"]
BAD_PATHS += ["/etc/hostname", "/proc/self/mem", "/dev/zero", "a\x00b", "/\x00", "\udcff", "a\x1b[2J", "\u202egnp"]
BAD_PATHS += [
    "good/..",
    "NUL/x",
    "./file",
    "file/x",
    "./loop",
    "loop/x",
    ".lock",
    ".good.0123456789ab.old",
    "GOOD",
    "Good",
]
