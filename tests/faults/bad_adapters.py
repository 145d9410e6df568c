"""Every kind of bad adapter that the tests know, each as a change to a sound one of ``small_model``."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

WIDTH = 64  # of the base; a multiple of 64, since bitsandbytes computes wrongly with others on a CPU
VOCABULARY = 512
WEIGHTS, CONFIG, CONTRACT = "adapter_model.safetensors", "adapter_config.json", "qlora_kit.json"
PREFIX = "base_model.model"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
TENSORS = dict[str, torch.Tensor]


def small_model() -> PreTrainedModel:
    """The base: a Qwen2 of two layers, 64 wide, with random weights (seed 0)."""
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen2ForCausalLM(config)


def make_adapter(folder: Path, **settings: Any) -> tuple[Path, Any]:
    """A PEFT adapter of ``small_model``, saved by PEFT; returns its folder and the PEFT model."""
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(small_model(), LoraConfig(**settings))
    model.save_pretrained(folder)
    return folder, model


def change_config(folder: Path, **changes: Any) -> None:
    """Set keys of the adapter's configuration."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(folder: Path, change: Callable[[TENSORS], Any]) -> None:
    """Let ``change`` alter the adapter's tensors by name."""
    path = folder / WEIGHTS
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def poison(value: float, dtype: torch.dtype) -> Callable[[TENSORS], Any]:
    """One bad value in one tensor, all of ``dtype``."""

    def change(tensors: TENSORS) -> None:
        for name in tensors:
            tensors[name] = tensors[name].to(dtype)
        tensors[f"{Q0}.lora_B.weight"][3, 1] = value

    return change


BAD_TENSORS: dict[str, tuple[Callable[[TENSORS], Any], str]] = {
    "base weight": (lambda t: t.update({f"{Q0}.base_layer.weight": torch.zeros(WIDTH, WIDTH)}), "not declared"),
    "base weight, plain": (lambda t: t.update({f"{Q0}.weight": torch.zeros(WIDTH, WIDTH)}), "not declared"),
    "norm": (lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(WIDTH)}), "not declared"),
    "embedding": (
        lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.ones(VOCABULARY, WIDTH)}),
        "not declared",
    ),
    "head": (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(VOCABULARY, WIDTH)}), "not declared"),
    "bias": (lambda t: t.update({f"{Q0}.bias": torch.ones(WIDTH)}), "not declared"),
    "wrapped bias": (lambda t: t.update({f"{Q0}.base_layer.bias": torch.ones(WIDTH)}), "not declared"),
    "magnitude": (lambda t: t.update({f"{Q0}.lora_magnitude_vector": torch.ones(WIDTH)}), "not declared"),
    "tokens": (
        lambda t: t.update(
            {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, WIDTH)}
        ),
        "not declared",
    ),
    "bias of B": (lambda t: t.update({f"{Q0}.lora_B.bias": torch.ones(WIDTH)}), "not declared"),
    "no prefix": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, WIDTH)}),
        "not declared",
    ),
    "untargeted pair": (
        lambda t: t.update({k.replace("q_proj", "o_proj"): v.clone() for k, v in t.items() if "q_proj" in k}),
        "not declared",
    ),
    "name of an adapter": (lambda t: t.update({f"{Q0}.lora_A.default.weight": torch.ones(4, WIDTH)}), "not declared"),
    "embedding factors": (
        lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 64)}),
        "not declared",
    ),
    "missing B": (lambda t: t.pop(f"{Q0}.lora_B.weight"), "is missing"),
    "missing A": (lambda t: t.pop(f"{Q0}.lora_A.weight"), "is missing"),
    "no tensors": (lambda t: t.clear(), "no LoRA pair"),
    "rank of A": (lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(8, WIDTH)}), "the rank"),
    "rank of B": (lambda t: t.update({f"{Q0}.lora_B.weight": torch.ones(WIDTH, 2)}), "the rank"),
    "swapped": (lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(WIDTH, 4)}), "the rank"),
    "one dimension": (lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(128)}), "the rank"),
    "convolution": (lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, WIDTH, 1, 1)}), "the rank"),
    "empty": (lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, 0)}), "the rank"),
    "integers": (lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, WIDTH, dtype=torch.int32)}), "dtype I32"),
    "bytes": (lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, WIDTH, dtype=torch.uint8)}), "dtype U8"),
    "8-bit floats": (
        lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, WIDTH).to(torch.float8_e4m3fn)}),
        "dtype F8_E4M3",
    ),
    "NaN": (poison(float("nan"), torch.float32), "1 values that are NaN or infinite"),
    "infinite": (poison(float("inf"), torch.float32), "NaN or infinite"),
    "NaN, bf16": (poison(float("nan"), torch.bfloat16), "NaN or infinite"),
    "infinite, bf16": (poison(float("-inf"), torch.bfloat16), "NaN or infinite"),
    "NaN, fp16": (poison(float("nan"), torch.float16), "NaN or infinite"),
    "fp64 beyond fp32": (poison(1e300, torch.float64), "finite in fp32"),
    "infinite, fp64": (poison(float("inf"), torch.float64), "NaN or infinite"),
}


BAD_SETTINGS: dict[str, dict[str, Any]] = {
    "another method": {"peft_type": "IA3"},
    "no method": {"peft_type": None},
    "rank 0": {"r": 0},
    "rank above the bound": {"r": 1025},
    "rank a flag": {"r": True},
    "rank a text": {"r": "4"},
    "another rank": {"r": 8},
    "alpha negative": {"lora_alpha": -1},
    "alpha a text": {"lora_alpha": "8"},
    "alpha beyond": {"lora_alpha": 1e9},
    "no targets": {"target_modules": []},
    "targets null": {"target_modules": None},
    "targets numbers": {"target_modules": [1]},
    "targets with a path": {"target_modules": ["../q_proj"]},
    "broken expression": {"target_modules": "(q_proj"},
    "lookbehind": {"target_modules": "(?<=x)q_proj"},
    "backreference": {"target_modules": r"(q)_proj\1"},
    "layers beside an expression": {"target_modules": "q_proj|v_proj", "layers_to_transform": [0]},
    "deeply nested": {"rank_pattern": {"a": [[[[0]]]]}},
    "exponential expression": {"target_modules": "(a+)+q_proj"},
    "long expression": {"target_modules": "q_proj|" * 1000},
    "rank pattern a list": {"rank_pattern": [4]},
    "rank pattern beyond": {"rank_pattern": {"q_proj": 5000}},
    "rank pattern unlike the tensors": {"rank_pattern": {"q_proj": 8}},
    "alpha pattern of texts": {"alpha_pattern": {"q_proj": "8"}},
    "unknown bias": {"bias": "some"},
    "modules to save a text": {"modules_to_save": "lm_head"},
    "DoRA without magnitudes": {"use_dora": True},
    "flag a text": {"use_rslora": "yes"},
    "initialisation that rewrites the base": {"init_lora_weights": "olora"},
    "PiSSA": {"init_lora_weights": "pissa_niter_4"},
    "LoftQ": {"init_lora_weights": "loftq"},
    "code to import": {"auto_mapping": {"base_model_class": "x", "parent_library": "antigravity"}},
    "remote code": {"auto_map": {"AutoModel": "evil.Model"}},
    "bias of B": {"lora_bias": True},
    "copied layers": {"layer_replication": [[0, 2]]},
    "parameters": {"target_parameters": ["mlp.weight"]},
    "QA-LoRA": {"use_qalora": True},
    "activated LoRA": {"alora_invocation_tokens": [1]},
    "transposed weights": {"fan_in_fan_out": True},
    "megatron": {"megatron_config": {"a": 1}},
    "a setting of tomorrow": {"use_something_new": True},
    "classification": {"task_type": "SEQ_CLS"},
    "tokens of texts": {"trainable_token_indices": ["a"]},
}


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self.path,))


def _change_settings(folder: Path, *, settings: dict[str, Any]) -> None:
    change_config(folder, **settings)


def both(settings: dict[str, Any], change: Callable[[TENSORS], Any]) -> Callable[[Path], None]:
    """Change the configuration and the tensors."""

    def spoil(folder: Path) -> None:
        change_config(folder, **settings)
        change_tensors(folder, change)

    return spoil


def add(**tensors: torch.Tensor) -> Callable[[TENSORS], Any]:
    """Add tensors below PEFT's prefix; double underscores stand for dots."""
    return lambda found: found.update({f"{PREFIX}.{k.replace('__', '.')}": tensor for k, tensor in tensors.items()})


def replaced_by_a_link(name: str) -> Callable[[Path], None]:
    """The file itself lies elsewhere."""

    def spoil(folder: Path) -> None:
        (folder / name).touch()
        elsewhere = folder.parent / f"elsewhere-{name}"
        (folder / name).rename(elsewhere)
        (folder / name).symlink_to(elsewhere)

    return spoil


def replaced_by(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Something else stands where the file was."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return spoil


def content(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    """Other bytes in a file."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def pickled(name: str, *, alone: bool) -> Callable[[Path], None]:
    """A pickle that makes the folder ``canary`` when it is loaded, beside the weights or instead of them."""

    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(pickle.dumps(Canary(folder.parent / "canary")))
        if alone:
            (folder / WEIGHTS).unlink()

    return spoil


def for_each_layer(name: str, tensor: torch.Tensor) -> Callable[[TENSORS], Any]:
    """The tensor ``name`` in both layers."""
    return lambda found: found.update({f"{PREFIX}.model.layers.{layer}.{name}": tensor.clone() for layer in (0, 1)})


def far_too_wide(folder: Path) -> None:
    """One pair of millions of features, in a file that takes no room on the disk."""
    shapes = {"A": (4, (1 << 22) + 1), "B": ((1 << 22) + 1, 4)}
    size = 16 * ((1 << 22) + 1)
    header = {
        f"{Q0}.lora_{letter}.weight": {"dtype": "F32", "shape": shape, "data_offsets": [at * size, (at + 1) * size]}
        for at, (letter, shape) in enumerate(shapes.items())
    }
    text = json.dumps(header).encode()
    with (folder / WEIGHTS).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 2 * size)


# What the gate refuses without looking at a base; each has a sound counterpart but for the one change.
BAD_FOLDERS: dict[str, Callable[[Path], Any]] = {
    "embedding declared as saved weight": both(
        {"modules_to_save": ["weight"]}, add(model__embed_tokens__weight=torch.zeros(VOCABULARY, WIDTH))
    ),
    "layer declared as saved layers": both(
        {"modules_to_save": ["layers"]}, for_each_layer("input_layernorm.weight", torch.zeros(WIDTH))
    ),
    "link as weights": replaced_by_a_link(WEIGHTS),
    "link as configuration": replaced_by_a_link(CONFIG),
    "link as contract": replaced_by_a_link(CONTRACT),
    "pipe as weights": replaced_by(WEIGHTS, os.mkfifo),
    "pipe as configuration": replaced_by(CONFIG, os.mkfifo),
    "folder as weights": replaced_by(WEIGHTS, Path.mkdir),
    "device as weights": replaced_by(WEIGHTS, lambda path: path.symlink_to("/dev/zero")),
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "no configuration": lambda folder: (folder / CONFIG).unlink(),
    "nothing at all": lambda folder: [path.unlink() for path in folder.iterdir()],
    "no folder": shutil.rmtree,
    "cut weights": content(WEIGHTS, lambda data: data[:-4]),
    "empty weights": content(WEIGHTS, lambda data: b""),
    "bytes behind the weights": content(WEIGHTS, lambda data: data + b"1234"),
    "header of 100 MB": content(WEIGHTS, lambda data: (10**8).to_bytes(8, "little") + data[8:]),
    "header beyond 64 bits": content(WEIGHTS, lambda data: b"\xff" * 8 + data[8:]),
    "pickle as weights": content(WEIGHTS, lambda data: pickle.dumps({"a": 1})),
    "pickle beside": pickled("adapter_model.bin", alone=False),
    "pickle alone": pickled("adapter_model.bin", alone=True),
    "pickle of torch": pickled("weights.PT", alone=True),
    "configuration cut": content(CONFIG, lambda data: data[:-3]),
    "configuration a list": content(CONFIG, lambda data: b"[]"),
    "configuration not UTF-8": content(CONFIG, lambda data: b"\xff" + data),
    "configuration of 5 MB": content(CONFIG, lambda data: data + b" " * 5_000_000),
    "configuration nested 500 deep": content(
        CONFIG, lambda data: data[:-2] + b',"x":' + b"[" * 500 + b"]" * 500 + b"}"
    ),
    "millions of features": far_too_wide,
    "more expressions than can be tried": lambda folder: change_config(
        folder, rank_pattern={f"a{index}.*": 4 for index in range(60_000)}
    ),
    "more tensors times patterns than can be tried": both(
        {"rank_pattern": {f"a{index}": 4 for index in range(100_000)}},
        lambda t: t.update({f"x{index}": torch.ones(1) for index in range(100)}),
    ),
    "a flood of unknown settings": lambda folder: change_config(folder, **{f"x{n}": "x" for n in range(50_000)}),
    "configuration with a huge number": content(CONFIG, lambda data: b'{"r":' + b"9" * 100_000 + b"}"),
}

# What only the base shows to be wrong.
MISFITS: dict[str, Callable[[Path], Any]] = {
    "biases of another width": both(
        {"bias": "all"}, for_each_layer("self_attn.q_proj.base_layer.bias", torch.ones(WIDTH + 1))
    ),
    "saved modules without tensors": lambda folder: change_config(folder, modules_to_save=["norm"]),
    "saved modules that the base lacks": lambda folder: change_config(folder, modules_to_save=["classifier"]),
    "saved copy of the whole model": lambda folder: change_config(folder, modules_to_save=["model"]),
    "saved copy of a layer in 4 bits": both(
        {"modules_to_save": ["o_proj"]}, for_each_layer("self_attn.o_proj.weight", torch.ones(WIDTH, WIDTH))
    ),
    "saved head of another shape": both({"modules_to_save": ["lm_head"]}, add(lm_head__weight=torch.ones(3, WIDTH))),
    "saved norm of one layer only": both(
        {"modules_to_save": ["input_layernorm"]}, add(model__layers__0__input_layernorm__weight=torch.ones(WIDTH))
    ),
    "more than the saved module has": both(
        {"modules_to_save": ["lm_head"]},
        add(lm_head__weight=torch.ones(VOCABULARY, WIDTH), lm_head__bias=torch.ones(9)),
    ),
    "tokens beyond the vocabulary": both(
        {"trainable_token_indices": [VOCABULARY]},
        add(model__embed_tokens__token_adapter__trainable_tokens_delta=torch.ones(1, WIDTH)),
    ),
    "a token twice": both(
        {"trainable_token_indices": [3, 3]},
        add(model__embed_tokens__token_adapter__trainable_tokens_delta=torch.ones(2, WIDTH)),
    ),
    "tokens of another width": both(
        {"trainable_token_indices": [3]},
        add(model__embed_tokens__token_adapter__trainable_tokens_delta=torch.ones(1, 31)),
    ),
    "tokens without tensors": lambda folder: change_config(folder, trainable_token_indices=[3]),
    "a layer that the base lacks": lambda folder: change_tensors(
        folder, lambda t: t.update({k.replace("layers.0", "layers.7"): v.clone() for k, v in t.items()})
    ),
    "a layer without its pair": lambda folder: change_tensors(
        folder, lambda t: [t.pop(k) for k in list(t) if "layers.0.self_attn.q_proj" in k]
    ),
    "another width": lambda folder: change_tensors(
        folder, lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, 8)})
    ),
    "a pair on a norm": both(
        {"target_modules": ["q_proj", "v_proj", "norm"]},
        add(model__norm__lora_A__weight=torch.ones(4, WIDTH), model__norm__lora_B__weight=torch.ones(WIDTH, 4)),
    ),
    "a pair on the embedding": both(
        {"target_modules": ["q_proj", "v_proj", "embed_tokens"]},
        add(
            model__embed_tokens__lora_A__weight=torch.ones(4, VOCABULARY),
            model__embed_tokens__lora_B__weight=torch.ones(WIDTH, 4),
        ),
    ),
    "contract a list": lambda folder: (folder / CONTRACT).write_text("[]"),
    "contract without its keys": lambda folder: (folder / CONTRACT).write_text('{"format_version": 1}'),
    "contract of a later format": lambda folder: (folder / CONTRACT).write_text('{"format_version": 99}'),
}

# Every kind as a change to a folder.
ALL_KINDS: dict[str, Callable[[Path], Any]] = {
    **{f"tensors: {kind}": partial(change_tensors, change=change) for kind, (change, _) in BAD_TENSORS.items()},
    **{f"settings: {kind}": partial(_change_settings, settings=settings) for kind, settings in BAD_SETTINGS.items()},
    **{f"folder: {kind}": spoil for kind, spoil in BAD_FOLDERS.items()},
    **{f"base: {kind}": spoil for kind, spoil in MISFITS.items()},
}
