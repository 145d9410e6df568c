"""A GGUF adapter holds what PEFT adds to the weights; what its one alpha cannot say is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf_models import llama3_tokenizer, random_model, save_base
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from qlora_kit.errors import AdapterError, ConfigError, OutputError, QloraKitError
from qlora_kit.export.gguf_lora import AdaptedWeights, write_gguf_lora
from qlora_kit.merging.tensor_check import WrittenTensors

Q_PROJ, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, chatml_tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    """A Qwen2 and a Llama; of the latter, query and key rows change places."""
    llama = llama3_tokenizer("{% for m in messages %}{{ m['content'] }}<|eot_id|>{% endfor %}")
    root = tmp_path_factory.mktemp("bases")
    return {
        family: save_base(root / family, random_model(family, len(tokens), eos_token_id=tokens.eos_token_id), tokens)
        for family, tokens in (("qwen2", chatml_tokenizer), ("llama", llama))
    }


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "adapter.gguf"


def make_adapter(base: Path, folder: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """Save an adapter as PEFT writes it; returns what PEFT adds to each adapted weight."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    chosen = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "down_proj"], **settings}
    adapted = get_peft_model(model, LoraConfig(**chosen, init_lora_weights=False))
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in adapted.named_modules()
        if hasattr(module, "get_delta_weight") and not name.endswith("embed_tokens")
    }


def added_by(path: Path, module: str) -> torch.Tensor:
    """What llama.cpp adds to a weight: alpha / rank · B·A (``llama_adapter_lora_weight::get_scale``)."""
    reader = gguf.GGUFReader(path)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    values = {tensor.name: torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)) for tensor in reader.tensors}
    a, b = values[f"{module}.lora_a"], values[f"{module}.lora_b"]
    return alpha / b.shape[1] * b @ a


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("rslora", [False, True])
def test_llama_cpp_adds_what_peft_adds(
    family: str, rslora: bool, bases: dict[str, Path], tmp_path: Path, out: Path
) -> None:
    deltas = make_adapter(bases[family], tmp_path / "adapter", use_rslora=rslora)
    file = write_gguf_lora(tmp_path / "adapter", bases[family], out)
    assert (file.kind, file.architecture, file.tensors) == ("lora", family, 2 * len(deltas))
    torch.testing.assert_close(added_by(out, "blk.0.ffn_down.weight"), deltas[DOWN], rtol=1e-5, atol=1e-7)
    found = added_by(out, "blk.1.attn_q.weight")
    if family == "llama":
        # llama.cpp's own converter does this to the weight (`permute` of conversion/llama.py), four heads of 16
        expected = deltas[Q_PROJ].reshape(4, 2, 8, 64).swapaxes(1, 2).reshape(64, 64)
        assert not torch.allclose(found, deltas[Q_PROJ])
    else:
        expected = deltas[Q_PROJ]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_the_header_says_that_it_is_an_adapter(bases: dict[str, Path], tmp_path: Path, out: Path) -> None:
    make_adapter(bases["qwen2"], tmp_path / "mine", use_rslora=True)
    write_gguf_lora(tmp_path / "mine", bases["qwen2"], out, quant="f16")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(out).fields.items()}
    assert (fields["general.type"], fields["adapter.type"], fields["general.name"]) == ("adapter", "lora", "mine")
    assert (fields["general.architecture"], fields["adapter.lora.alpha"]) == ("qwen2", 6 * 2)
    assert {tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors} == {"F16"}


def test_the_reference_of_a_check_is_base_and_adapter(bases: dict[str, Path], tmp_path: Path) -> None:
    deltas = make_adapter(bases["qwen2"], tmp_path / "adapter")
    weights = load_file(bases["qwen2"] / "model.safetensors")
    with WrittenTensors(bases["qwen2"]) as base:
        adapted = AdaptedWeights(base, tmp_path / "adapter")
        for module in (Q_PROJ, DOWN):
            found = torch.cat([rows.result for rows in adapted.blocks(f"{module}.weight")])
            expected = weights[f"{module}.weight"].float() + deltas[module]
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        untouched = "model.layers.0.mlp.up_proj.weight"
        assert torch.equal(torch.cat([rows.result for rows in adapted.blocks(untouched)]), weights[untouched])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora is true, and llama.cpp has no DoRA"),
    "bias": ({"bias": "lora_only"}, "bias is 'lora_only', and llama.cpp has no biases"),
    "saved modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
    "rank pattern": ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is {'q_proj': 2}, and llama.cpp has one scale"),
    "alpha pattern": ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern is {'q_proj': 3}, and llama.cpp has one scale"),
    "trained tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices is"),
    "two at once": ({"use_dora": True, "alpha_pattern": {"q_proj": 3}}, "alpha_pattern is {'q_proj': 3}"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_gguf_adapter_cannot_say_is_refused(
    case: str, bases: dict[str, Path], tmp_path: Path, out: Path
) -> None:
    settings, message = REFUSED[case]
    make_adapter(bases["qwen2"], tmp_path / "adapter", **settings)
    with pytest.raises(AdapterError) as caught:
        write_gguf_lora(tmp_path / "adapter", bases["qwen2"], out)
    assert message in str(caught.value)
    assert "merged model" in caught.value.faults[0].fix
    assert list(out.parent.iterdir()) == []


def _other_rank(folder: Path) -> None:
    content = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**content, "r": 8}))


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors"),
    "another rank": (_other_rank, "shape"),
    "cut off": (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x08" * 40), "header"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_broken_adapter_is_refused(case: str, bases: dict[str, Path], tmp_path: Path, out: Path) -> None:
    make_adapter(bases["qwen2"], tmp_path / "adapter")
    spoil, message = SPOILT[case]
    spoil(tmp_path / "adapter")
    with pytest.raises(QloraKitError, match=message):
        write_gguf_lora(tmp_path / "adapter", bases["qwen2"], out)
    assert list(out.parent.iterdir()) == []


def test_another_base_kind_and_path_are_refused(
    bases: dict[str, Path], tmp_path: Path, out: Path, chatml_tokenizer: PreTrainedTokenizerFast
) -> None:
    make_adapter(bases["qwen2"], tmp_path / "adapter")
    wide = random_model("qwen2", len(chatml_tokenizer), eos_token_id=2, intermediate_size=128)
    save_base(tmp_path / "wide", wide, chatml_tokenizer)
    with pytest.raises(AdapterError, match=r"the base's shape \(64, 128\)"):
        write_gguf_lora(tmp_path / "adapter", tmp_path / "wide", out)
    with pytest.raises(ConfigError, match="adapters are not written so"):
        write_gguf_lora(tmp_path / "adapter", bases["qwen2"], out, quant="q8_0")
    out.write_text("mine")
    with pytest.raises(OutputError, match="is there already"):
        write_gguf_lora(tmp_path / "adapter", bases["qwen2"], out)
