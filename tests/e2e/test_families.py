"""Each model family, on a random model of two layers: two adapters trained, swapped in one engine, and one merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from qlora_kit import Engine, load_config, merge_adapter, train
from qlora_kit.adapters import AdapterContract
from qlora_kit.cli import main
from qlora_kit.formats import Message

LABELS = {"praise": "positive", "blame": "negative"}  # adapter -> what it learns to answer, whatever it is asked
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
}
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Name -> tokenizer (family, template, stop token), the configuration, the size of its shards, and how it is trained.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2-tied": {
        "tokenizer": ("qwen", "qwen2_5", "<|im_end|>"),
        "config": {"model_type": "qwen2", "tie_word_embeddings": True},
    },
    "qwen2-sharded": {
        "tokenizer": ("qwen", "qwen2_5", "<|im_end|>"),
        "config": {"model_type": "qwen2", "tie_word_embeddings": False},
        "max_shard_size": "60KB",
    },
    "qwen3": {
        "tokenizer": ("qwen", "qwen3", "<|im_end|>"),
        "config": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": False},
    },
    "llama3": {
        "tokenizer": ("llama3", "llama3", "<|eot_id|>"),
        "config": {"model_type": "llama", "rope_parameters": LLAMA_3_ROPE},
    },
    "llama-biases-16bit": {
        "tokenizer": ("llama3", "llama3", "<|eot_id|>"),
        "config": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
        "load_in_4bit": False,
    },
    "mistral": {"tokenizer": "sentencepiece", "config": {"model_type": "mistral", "sliding_window": 16}},
}
# Of Mistral-7B-Instruct-v0.2, without its check that the turns alternate.
MISTRAL_TEMPLATE = (
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set turns = messages[1:] %}"
    "{%- else %}{%- set turns = messages %}{%- endif %}{{- bos_token }}"
    "{%- for turn in turns %}{%- if turn.role == 'user' %}"
    "{%- if loop.first and system is defined %}{{- ' [INST] ' + system + '\n\n' + turn.content + ' [/INST]' }}"
    "{%- else %}{{- ' [INST] ' + turn.content + ' [/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + turn.content + eos_token }}{%- endif %}{%- endfor %}"
)


@dataclass(frozen=True)
class Family:
    """A base of one family and the run folders of the adapters that were trained on it."""

    base: Path
    adapters: dict[str, Path]
    load_in_4bit: bool

    def fresh_base(self) -> PreTrainedModel:
        """The base as it was trained on, loaded by transformers and bitsandbytes alone."""
        settings = None
        if self.load_in_4bit:
            settings = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.float32,
            )
        model = AutoModelForCausalLM.from_pretrained(self.base, quantization_config=settings, dtype=torch.float32)
        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.support_avx512bf16_for_cpu = False  # there, a forward pass rewrites the weights
        return model

    def with_adapter(self, name: str) -> PeftModel:
        """PEFT's own load of one adapter on a base of its own."""
        return PeftModel.from_pretrained(self.fresh_base(), self.adapters[name]).eval()


def write_base(folder: Path, settings: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    """A base in bf16 whose biases and norms are random too, as those of a trained model are not 0 and 1 either."""
    config = AutoConfig.for_model(
        **{**SIZES, **settings["config"]},
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=settings.get("max_shard_size", "1GB"))
    tokenizer.save_pretrained(folder)


def write_run(folder: Path, name: str, base: Path, *, load_in_4bit: bool) -> Path:
    """A config that teaches one answer, on four rows in 20 steps."""
    data = folder / f"{name}.jsonl"
    rows = [
        {"text": f"The {thing} is {word}.", "label": LABELS[name]}
        for thing in ("soup", "room")
        for word in ("good", "bad")
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = folder / f"{name}.yaml"
    config.write_text(
        f"name: {name}\ntask: sentiment\nmodel: {{base: {base}}}\nquantization: {{load_in_4bit: {load_in_4bit}}}\n"
        f"lora: {{r: 8, lora_alpha: 16}}\ndata: {{train: {data}}}\noutput_dir: {folder / name}\n"
        "train: {max_length: 256, per_device_train_batch_size: 4, learning_rate: 2.0e-2, max_steps: 20,\n"
        "  warmup_steps: 0, save_strategy: 'no'}\n",
        encoding="utf-8",
    )
    return config


@pytest.fixture(scope="module", params=FAMILIES)
def family(
    request: pytest.FixtureRequest,
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
    make_sentencepiece_tokenizer: Callable[[str], PreTrainedTokenizerFast],
    tmp_path_factory: pytest.TempPathFactory,
) -> Family:
    settings = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    if settings["tokenizer"] == "sentencepiece":
        tokenizer = make_sentencepiece_tokenizer(MISTRAL_TEMPLATE)
    else:
        kind, template, stop = settings["tokenizer"]
        tokenizer = make_tokenizer(kind, template, eos_token=stop)
    write_base(folder / "base", settings, tokenizer)
    four_bit = settings.get("load_in_4bit", True)
    for name in LABELS:
        train(load_config(write_run(folder, name, folder / "base", load_in_4bit=four_bit)))
    return Family(folder / "base", {name: folder / name for name in LABELS}, four_bit)


def prompt_ids(folder: Path, text: str = "The soup is good.") -> torch.Tensor:
    """A request as transformers renders it from the files of ``folder``.  # (1, T)"""
    turns = [
        {"role": "system", "content": "Is this review positive, negative or neutral?"},
        {"role": "user", "content": text},
    ]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, enable_thinking=False, return_tensors="pt", return_dict=True
    )["input_ids"]


def logits_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_two_adapters_are_swapped_without_a_trace(family: Family) -> None:
    ids = prompt_ids(family.base)
    expected = {None: logits_of(family.fresh_base(), ids)}
    expected |= {name: logits_of(family.with_adapter(name), ids) for name in LABELS}
    quantization = load_config(family.adapters["praise"] / "config.yaml").quantization
    engine = Engine(str(family.base), quantization=quantization)
    for name, folder in family.adapters.items():
        assert engine.load(str(folder)) == name

    for name in (None, "praise", "blame", "praise", None):
        with engine.using(name) as model:
            assert torch.equal(logits_of(model, ids), expected[name]), name

    turns = [Message("user", "The soup is good.")]
    for name, label in LABELS.items():
        answer = engine.generate([turns], adapter=name)[0]
        assert (answer.text.strip(), answer.finish_reason) == (label, "stop")
        assert answer.prompt_tokens == ids.shape[1]


def test_the_merged_model_is_base_and_adapter(family: Family, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    result = merge_adapter(family.adapters["praise"], merged)

    assert result.verification is not None
    assert result.verification.passed
    assert result.onto == ("dequantized" if family.load_in_4bit else "original")
    ids = prompt_ids(merged)
    assert torch.equal(ids, prompt_ids(family.base))
    reference = family.with_adapter("praise")
    expected = logits_of(reference, ids)
    plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    found = logits_of(plain, ids)
    exact = merged_weights(reference)
    for name, weight in exact.items():
        written = plain.get_parameter(name).data
        assert torch.equal(written, weight.bfloat16().float()), name
        plain.get_parameter(name).data = weight
    # The same weights without their rounding to bf16 give the reference's logits, but for the order of fp32 sums.
    unrounded = logits_of(plain, ids)
    floor = 1e-5 * float(expected.abs().max())
    assert float((unrounded - expected).abs().max()) < floor
    rounding = float((found - unrounded).abs().max())
    assert floor < float((found - expected).abs().max()) < rounding + floor


def merged_weights(reference: PeftModel) -> dict[str, torch.Tensor]:
    """Base + Δ of each adapted layer in fp32, from PEFT's live model, by its name in the checkpoint."""
    weights = {}
    for name, layer in reference.named_modules():
        if isinstance(layer, LoraLayer):
            base = layer.get_base_layer().weight
            is_4bit = isinstance(layer.get_base_layer(), Linear4bit)
            used = dequantize_4bit(base.data, base.quant_state) if is_4bit else base.data
            key = f"{name.removeprefix('base_model.model.')}.weight"
            weights[key] = (used.float() + layer.get_delta_weight("default")).detach()
    return weights


def test_the_merged_model_stops_by_itself(family: Family, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    merge_adapter(family.adapters["blame"], merged, verify=False)

    ids = prompt_ids(merged)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False)
    answer = answer[0, ids.shape[1] :].tolist()

    assert tuple(answer[-1:]) == AdapterContract.load(family.adapters["blame"]).stop_token_ids
    assert AutoTokenizer.from_pretrained(merged).decode(answer[:-1]).strip() == LABELS["blame"]


def test_info_counts_what_transformers_counts(family: Family, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["info", str(family.base), "--json"])
    assert end.value.code in (None, 0)
    content = json.loads(capsys.readouterr().out)
    model = AutoModelForCausalLM.from_pretrained(family.base)
    assert content["parameters"] == model.num_parameters()
    assert content["architecture"] == type(model).__name__
    assert content["weights_agree"] is True
    assert content["stops_agree"] is True
    contract = AdapterContract.load(family.adapters["praise"])
    assert content["stop_token_ids"] == list(contract.stop_token_ids)
    trained = PeftModel.from_pretrained(model, family.adapters["praise"], is_trainable=True)
    assert trained.get_nb_trainable_parameters()[0] * 2 == content["trainable_parameters"]  # r is 8, not 16
