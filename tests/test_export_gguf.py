"""GGUF files hold the model, as the gguf package and transformers' own loader read them; bad input leaves nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import QWEN_PATTERN
from gguf_models import SIZES, llama3_tokenizer, mistral_tokenizer, random_model, save_base
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from qlora_kit.base_files import TINY_FOLDER
from qlora_kit.errors import BaseModelError, ConfigError, GuardError, OutputError, QloraKitError
from qlora_kit.export import export_model
from qlora_kit.export.gguf_check import require_binding
from qlora_kit.export.gguf_metadata import read_gguf_model
from qlora_kit.export.gguf_model import write_gguf
from qlora_kit.export.gguf_names import ARCHITECTURES, gguf_name
from qlora_kit.export.gguf_quants import QUANTS

PYTHON_QUANTS = tuple(name for name, quant in QUANTS.items() if quant.quantizer is None)
ARRAYS = gguf.GGUFValueType.ARRAY
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory, chatml_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A Qwen2 with an untied head and seven more rows than its tokenizer has tokens."""
    size = len(chatml_tokenizer) + 7
    model = random_model("qwen2", size, eos_token_id=chatml_tokenizer.eos_token_id, bos_token_id=None)
    return save_base(tmp_path_factory.mktemp("qwen"), model, chatml_tokenizer)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with biases, whose query and key rows change places."""
    tokenizer = llama3_tokenizer("{% for m in messages %}{{ m['content'] }}<|eot_id|>{% endfor %}")
    model = random_model("llama", len(tokenizer), eos_token_id=tokenizer.eos_token_id, attention_bias=True)
    return save_base(tmp_path_factory.mktemp("llama"), model, tokenizer)


@pytest.fixture
def base(qwen: Path, tmp_path: Path) -> Path:
    """A copy of ``qwen`` to spoil."""
    shutil.copytree(qwen, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "model.gguf"


def keys_of(path: Path) -> dict[str, Any]:
    """The header's values, by the gguf package's reader."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    """The tensors, dequantized by the gguf package."""
    return {
        tensor.name: gguf.dequantize(np.array(tensor.data), tensor.tensor_type)
        for tensor in gguf.GGUFReader(path).tensors
    }


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


def edit_tokenizer(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    edit(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["qwen", "llama"])
def test_transformers_own_loader_reads_the_same_weights(family: str, out: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(family)
    write_gguf(folder, out, quant="f32")
    loaded = AutoModelForCausalLM.from_pretrained(out.parent, gguf_file=out.name, dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = original.state_dict()
    found = loaded.state_dict()
    compared = [name for name in expected if not name.endswith("_proj.bias") or family == "qwen"]
    assert len(compared) >= 20
    for name in compared:
        assert torch.equal(found[name], expected[name]), name
    assert loaded.config.rope_parameters["rope_theta"] == original.config.rope_parameters["rope_theta"]
    for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "max_position_embeddings"):
        assert getattr(loaded.config, key) == pytest.approx(getattr(original.config, key), rel=1e-6)


def test_names_are_those_of_the_gguf_package() -> None:
    for family, config in (("qwen3", {}), ("llama", {"attention_bias": True, "mlp_bias": True}), ("qwen2", {})):
        content = {**SIZES, "model_type": family, "vocab_size": 64, **config}
        names = read_gguf_model(content, where="config.json").architecture.tensors()
        arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[family])
        table = gguf.get_tensor_name_map(arch, SIZES["num_hidden_layers"])
        assert {name: gguf_name(name) for name in names} == {
            name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in names
        }


# Largest error of a number: half a step of its block. d is the block's scale, a the largest absolute number in it.
STEPS = {"q8_0": 1 / 127, "q5_1": 2 / 31, "q5_0": 1 / 16, "q4_1": 2 / 15, "q4_0": 1 / 8}


@pytest.mark.parametrize("quant", PYTHON_QUANTS)
def test_each_format_holds_the_weights_within_its_step(quant: str, qwen: Path, out: Path) -> None:
    file = write_gguf(qwen, out, quant=quant)
    found = tensors_of(out)
    weights = {gguf_name(name): value.float().numpy() for name, value in load_file(qwen / "model.safetensors").items()}
    assert found.keys() == weights.keys()
    for name, expected in weights.items():
        value = found[name].reshape(expected.shape)
        if expected.ndim == 1 or quant in ("f32", "bf16"):
            assert np.array_equal(value, expected), name
            continue
        kind = "q8_0" if name in ("token_embd.weight", "output.weight") and quant in STEPS else quant
        blocks = np.abs(expected).reshape(-1, 32).max(axis=1, keepdims=True) if kind in STEPS else np.abs(expected)
        # A block's largest number may lie one step from the end of the range; scales are fp16.
        limit = blocks * STEPS[kind] * 1.01 if kind in STEPS else blocks * 2.0**-11 + 2.0**-25
        assert (np.abs(value - expected).reshape(blocks.shape[0], -1) <= limit).all(), name
        assert np.abs(value - expected).max() > 0 or kind == "f16"
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors}
    assert types["blk.0.ffn_up.weight"] == QUANTS[quant].matrices
    assert types["blk.0.attn_norm.weight"] == types["blk.0.attn_q.bias"] == "F32"
    assert file.bytes == out.stat().st_size
    assert keys_of(out)["general.file_type"] == gguf.LlamaFileType[QUANTS[quant].file_type]


def test_the_header_says_the_shape_and_the_tokens(qwen: Path, out: Path, chatml_tokenizer: Any) -> None:
    file = write_gguf(qwen, out, quant="bf16", name="Mine")
    keys, size = keys_of(out), len(chatml_tokenizer)
    assert keys["general.architecture"] == file.architecture == "qwen2"
    assert (keys["general.name"], keys["general.type"]) == ("Mine", "model")
    assert (keys["qwen2.block_count"], keys["qwen2.attention.head_count_kv"]) == (2, 2)
    assert (keys["qwen2.rope.freq_base"], keys["qwen2.context_length"]) == (10000.0, 512)
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("gpt2", "qwen2")
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == size + 7
    assert [tokens[number] for number in range(size)] == chatml_tokenizer.convert_ids_to_tokens(range(size))
    assert types[size:] == [gguf.TokenType.UNUSED] * 7
    end, pad = chatml_tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert types[end] == types[pad] == gguf.TokenType.CONTROL
    assert types[tokens.index("a")] == gguf.TokenType.NORMAL
    assert keys["tokenizer.ggml.eos_token_id"] == keys["tokenizer.ggml.eot_token_id"] == end == file.stop_token_ids[0]
    assert keys["tokenizer.ggml.padding_token_id"] == keys["tokenizer.ggml.bos_token_id"] == pad
    assert keys["tokenizer.ggml.add_bos_token"] is keys["tokenizer.ggml.add_eos_token"] is False
    assert keys["tokenizer.chat_template"] == chatml_tokenizer.chat_template
    merges = json.loads(chatml_tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert keys["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]


def test_a_tied_head_is_left_out_and_an_untied_one_is_not(qwen: Path, base: Path, out: Path) -> None:
    write_gguf(qwen, out, quant="f16")
    assert "output.weight" in tensors_of(out)
    edit_json(base / "config.json", tie_word_embeddings=True)
    edit_weights(base, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone()}))
    write_gguf(base, out.with_name("tied.gguf"), quant="f16")
    assert "output.weight" not in tensors_of(out.with_name("tied.gguf"))


def test_added_tokens_keep_their_kind(base: Path, out: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<label>"])
    tokenizer.add_tokens(["<|tool|>"], special_tokens=True)
    tokenizer.save_pretrained(base)
    write_gguf(base, out, quant="f16")
    keys = keys_of(out)
    kinds = dict(zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"], strict=True))
    assert kinds["<label>"] == gguf.TokenType.USER_DEFINED, "a part of an answer must not be hidden as a control token"
    assert kinds["<|tool|>"] == gguf.TokenType.CONTROL


def test_without_a_generation_config_the_template_says_where_answers_end(base: Path, out: Path) -> None:
    (base / "generation_config.json").unlink()
    edit_json(base / "config.json", eos_token_id=None)
    file = write_gguf(base, out, quant="f16")
    end = AutoTokenizer.from_pretrained(base).convert_tokens_to_ids("<|im_end|>")
    assert file.stop_token_ids == (end,)
    assert keys_of(out)["tokenizer.ggml.eos_token_id"] == end, "llama.cpp would take 11"


def test_a_further_stop_token_has_a_place_and_a_third_is_refused(base: Path, out: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<|stop|>", "<|halt|>"], special_tokens=True)
    tokenizer.save_pretrained(base)
    stop, halt = tokenizer.convert_tokens_to_ids(["<|stop|>", "<|halt|>"])
    edit_json(base / "generation_config.json", eos_token_id=[stop])
    assert write_gguf(base, out, quant="f16").stop_token_ids[1] == stop
    assert keys_of(out)["tokenizer.ggml.eom_token_id"] == stop
    edit_json(base / "generation_config.json", eos_token_id=[stop, halt])
    with pytest.raises(BaseModelError, match=r"<\|halt\|>"):
        write_gguf(base, out.with_name("more.gguf"), quant="f16")


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default", "rope_theta": 1e6}, {"rope.freq_base": 1e6}),
        (
            {"rope_type": "linear", "rope_theta": 5e3, "factor": 2.0},
            {"rope.freq_base": 5e3, "rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
        ),
        (
            {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128},
            {"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 128, "rope.scaling.attn_factor": 1.0},
        ),
    ],
    ids=["default", "linear", "yarn"],
)
def test_rotary_settings_come_from_rope_parameters(
    rope: dict[str, Any], expected: dict[str, Any], base: Path, out: Path
) -> None:
    edit_json(base / "config.json", rope_parameters=rope)
    write_gguf(base, out, quant="f16")
    keys = keys_of(out)
    assert {name: keys[f"qwen2.{name}"] for name in expected} == expected


def test_llama3_scaling_is_transformers_own(llama: Path, tmp_path: Path, out: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "llama")
    rope = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    edit_json(folder / "config.json", rope_parameters={**rope, "original_max_position_embeddings": 64})
    write_gguf(folder, out, quant="f16")
    model = AutoModelForCausalLM.from_pretrained(folder)
    plain = 1.0 / 500.0 ** (torch.arange(0, 16, 2) / 16)
    factors = torch.tensor(tensors_of(out)["rope_freqs.weight"])
    torch.testing.assert_close(plain / factors, model.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)
    assert factors.unique().numel() > 2


def test_a_sliding_window_ends_the_context(tmp_path: Path, out: Path) -> None:
    tokenizer = mistral_tokenizer()
    model = random_model("mistral", len(tokenizer), eos_token_id=2, sliding_window=128)
    file = write_gguf(save_base(tmp_path / "mistral", model, tokenizer), out, quant="f16")
    keys = keys_of(out)
    assert keys["llama.context_length"] == file.context_length == 128, "llama.cpp attends to all positions of it"
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.add_space_prefix"]) == ("llama", True)
    types = keys["tokenizer.ggml.token_type"]
    assert types[:4] == [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, gguf.TokenType.BYTE]
    scores = dict(zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.scores"], strict=True))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    joined = [scores["".join(pair)] for pair in merges]
    assert joined == sorted(joined, reverse=True), "llama.cpp merges the highest score first"


def test_qwen3s_template_keeps_the_empty_thought(tmp_path: Path, make_tokenizer: Any, out: Path) -> None:
    tokenizer = make_tokenizer("qwen", "qwen3", eos_token="<|im_end|>")
    model = random_model("qwen3", len(tokenizer), eos_token_id=tokenizer.eos_token_id, head_dim=32)
    write_gguf(save_base(tmp_path / "qwen3", model, tokenizer), out, quant="f16")
    tokenizer.chat_template = keys_of(out)["tokenizer.chat_template"]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<think>\n\n</think>\n\n"), "as the kit renders each prompt, whatever a program passes"
    assert keys_of(out)["qwen3.attention.key_length"] == 32


def test_rows_that_fill_no_block_stay_in_fp16(tmp_path: Path, chatml_tokenizer: Any, out: Path) -> None:
    model = random_model("qwen2", len(chatml_tokenizer), eos_token_id=2, intermediate_size=72)
    file = write_gguf(save_base(tmp_path / "odd", model, chatml_tokenizer), out, quant="q8_0")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors}
    assert types["blk.0.ffn_down.weight"] == "F16" and types["blk.0.ffn_up.weight"] == "Q8_0"
    assert file.types["F16"] == 2


def test_progress_ends_with_the_last_byte(qwen: Path, out: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_gguf(qwen, out, quant="f32", progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen) and seen[-1][0] == seen[-1][1]
    assert seen[-1][1] == sum(tensor.n_bytes for tensor in gguf.GGUFReader(out).tensors)


def test_k_quants_are_made_by_llama_cpps_quantizer(
    qwen: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "llama-quantize"
    program.write_text('#!/bin/sh\necho "$3" > "$(dirname "$0")/asked"\ncp "$1" "$2"\n')
    program.chmod(0o755)
    monkeypatch.setenv("QLORA_KIT_LLAMA_QUANTIZE", str(program))
    file = write_gguf(qwen, out, quant="q4_k_m")
    assert (tmp_path / "asked").read_text() == "Q4_K_M\n"
    assert file.types["BF16"] == 16, "it is given the weights as they are"
    assert list(out.parent.iterdir()) == [out]
    program.write_text('#!/bin/sh\necho "bad tensor" >&2\nexit 3\n')
    with pytest.raises(GuardError, match="ended with code 3: bad tensor"):
        write_gguf(qwen, out.with_name("again.gguf"), quant="q6_k")
    assert list(out.parent.iterdir()) == [out]


def test_without_a_quantizer_k_quants_are_refused(qwen: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_KIT_LLAMA_QUANTIZE", "/nowhere/llama-quantize")
    with pytest.raises(ConfigError, match="no llama-quantize at /nowhere"):
        write_gguf(qwen, out, quant="q4_k_m")


def test_a_check_without_the_binding_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_kit.export.gguf_check.BINDING", "no_such_binding")
    with pytest.raises(ConfigError, match="llama-cpp-python is not installed"):
        require_binding()


def test_a_binding_that_does_not_start_is_told_before_anything_is_written(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "llama_cpp"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise FileNotFoundError(\"Shared library 'llama' not found\")")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.syspath_prepend(package.parent)
    with pytest.raises(ConfigError, match=r"does not start: .*'llama' not found"):
        export_model(qwen, "gguf", tmp_path / "out", check=True, progress=no_progress)


def no_progress(stage: str, done_bytes: int, total_bytes: int) -> None:
    raise AssertionError(f"{stage} began")


def test_a_file_that_was_replaced_is_not_opened(qwen: Path, out: Path) -> None:
    file = write_gguf(qwen, out, quant="f16")
    file.require_unchanged()
    shutil.copyfile(out, out.with_name("other"))
    out.with_name("other").replace(out)
    with pytest.raises(GuardError, match="is not the file that was written"):
        file.require_unchanged()


def _with_nan(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan


def _too_large(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"][0] = 1e5  # a vector stays in fp32
    weights["model.layers.1.mlp.up_proj.weight"][3, :2] = 1e5


def _untie(folder: Path) -> None:
    edit_json(folder / "config.json", tie_word_embeddings=True)


def _rope(**settings: Any) -> Change:
    return lambda folder: edit_json(folder / "config.json", rope_parameters={"rope_theta": 1e4, **settings})


def _config(**changes: Any) -> Change:
    return lambda folder: edit_json(folder / "config.json", **changes)


BAD: dict[str, tuple[Change, str]] = {
    "another family": (_config(model_type="gemma2"), "model_type is 'gemma2'"),
    "another activation": (_config(hidden_act="gelu"), "hidden_act is 'gelu'"),
    "longrope": (_rope(rope_type="longrope", factor=2.0), "scaled by 'longrope'"),
    "llama3 rope in qwen2": (_rope(rope_type="llama3", factor=8.0), "scaled by 'llama3'"),
    "linear rope without factor": (_rope(rope_type="linear"), "factor of the rotary embedding is None"),
    "rope setting that would be lost": (_rope(rope_type="default", partial_rotary_factor=0.5), "partial_rotary_factor"),
    "yarn that does not truncate": (
        _rope(rope_type="yarn", factor=2.0, original_max_position_embeddings=64, truncate=False),
        "truncate",
    ),
    "yarn with a text for a number": (
        _rope(rope_type="yarn", factor=2.0, original_max_position_embeddings=64, beta_fast="many"),
        "beta_fast of the rotary embedding is 'many'",
    ),
    "no epsilon": (_config(rms_norm_eps=None), "rms_norm_eps is 'None'"),
    "quantized already": (_config(quantization_config={"quant_method": "bitsandbytes"}), "quantized already"),
    "code of its own": (_config(auto_map={"AutoModel": "x.y"}), "code of its own"),
    "fewer layers than described": (_config(num_hidden_layers=3), "model.layers.2"),
    "tied, with a head of its own": (_untie, "ties the head"),
    "NaN": (lambda folder: edit_weights(folder, _with_nan), "holds 1 values that are NaN"),
    "beyond fp16": (lambda folder: edit_weights(folder, _too_large), "holds 2 values beyond the range of fp16"),
    "fp8 weights": (
        lambda folder: edit_weights(
            folder, lambda w: w.update({"lm_head.weight": w["lm_head.weight"].to(torch.float8_e4m3fn)})
        ),
        "F8_E4M3",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer"),
    "no template": (lambda folder: (folder / "chat_template.jinja").unlink(), "no chat template"),
}
# transformers builds Qwen's tokenizer again from its tokens and merges, whatever else the file says; Llama's it reads.
BAD_TOKENIZERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "unknown split": (
        lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\w+|\s+"),
        "splits text by",
    ),
    "a known split with other merges": (
        lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=QWEN_PATTERN),
        "ignore_merges true",
    ),
    "no split": (lambda t: t.update(pre_tokenizer=None), "an unknown way"),
    "lower case": (lambda t: t.update(normalizer={"type": "Lowercase"}), "normalises text by 'Lowercase'"),
    "token that eats spaces": (lambda t: t["added_tokens"][1].update(rstrip=True), "has rstrip set"),
    "word pieces": (
        lambda t: t.update(model={"type": "WordLevel", "vocab": t["model"]["vocab"], "unk_token": "a"}),
        "of the kind 'WordLevel'",
    ),
    "more tokens than rows": (
        lambda t: t["added_tokens"].append(
            {**t["added_tokens"][0], "id": len(t["model"]["vocab"]), "content": "<|one more|>"}
        ),
        "a row of the embedding for each token",
    ),
    "other tokens around a text": (
        lambda t: t["post_processor"]["special_tokens"]["<|begin_of_text|>"].update(ids=[3]),
        "other tokens around a text",
    ),
}


@pytest.mark.parametrize("case", BAD_TOKENIZERS)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(case: str, llama: Path, tmp_path: Path, out: Path) -> None:
    edit, message = BAD_TOKENIZERS[case]
    folder = Path(shutil.copytree(llama, tmp_path / "llama"))
    edit_tokenizer(folder, edit)
    with pytest.raises(BaseModelError, match=message):
        write_gguf(folder, out, quant="f16")
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_leaves_nothing(case: str, base: Path, out: Path) -> None:
    spoil, message = BAD[case]
    spoil(base)
    with pytest.raises(QloraKitError) as caught:
        write_gguf(base, out, quant="f16")
    assert message in str(caught.value)
    assert caught.value.exit_code == 2
    assert list(out.parent.iterdir()) == []


def test_merges_that_scores_cannot_say_are_refused(tmp_path: Path, out: Path) -> None:
    tokenizer = mistral_tokenizer(whole=False)
    model = random_model("mistral", len(tokenizer), eos_token_id=2)
    with pytest.raises(BaseModelError, match="merge text in another order"):
        write_gguf(save_base(tmp_path / "m", model, tokenizer), out, quant="f16")


def test_an_unknown_kind_an_occupied_file_and_a_missing_folder_are_refused(qwen: Path, out: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean q4_k_m"):
        write_gguf(qwen, out, quant="q4_k_n")
    with pytest.raises(OutputError, match="no such folder"):
        write_gguf(qwen, out.parent / "deeper" / "x.gguf", quant="f16")
    out.write_text("mine")
    with pytest.raises(OutputError, match="is there already"):
        write_gguf(qwen, out, quant="f16")
    assert out.read_text() == "mine"


def test_a_disk_without_room_is_refused_before_writing(qwen: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(out.parent)._replace(free=1000)
    monkeypatch.setattr("qlora_kit.atomic.shutil.disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match="are free on its disk"):
        write_gguf(qwen, out, quant="f16")
    assert list(out.parent.iterdir()) == []


def test_tiny_is_written(out: Path) -> None:
    file = write_gguf(TINY_FOLDER, out, quant="q8_0")
    assert (file.architecture, file.tensors) == ("qwen2", 62)
    assert 8.5 < file.bits_per_weight < 8.6
    assert "output.weight" not in tensors_of(out)
