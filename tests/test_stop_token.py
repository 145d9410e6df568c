"""A stop token that a base never learned is recognised by its rows, trained with the adapter, swapped and merged."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from qlora_kit.adapters import AdapterContract
from qlora_kit.base_files import resolve_base
from qlora_kit.config import LoraSection, QuantizationSection, RunConfig, load_config
from qlora_kit.engine import Engine
from qlora_kit.errors import AdapterError, ConfigError, GuardError
from qlora_kit.formats import Message
from qlora_kit.generation import Sampling
from qlora_kit.merging import merge_adapter
from qlora_kit.models import load_base_model, load_tokenizer
from qlora_kit.shard_writer import ShardWriter
from qlora_kit.stop_token import choose_token_rows, examine_stop_token
from qlora_kit.training import train

PADDING_ROWS = 16
IDS = torch.arange(0, 40).reshape(2, 20)  # with the stop token, id 2
STOP, EOS = 2, 0
ANSWERS = {"good": "positive", "bad": "negative", "red": "neutral"}
TEXTS = {f"The {thing} is {word}.": label for thing in ("soup", "room") for word, label in ANSWERS.items()}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Change = Callable[[torch.Tensor], None]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def never_trained(matrix: torch.Tensor) -> None:
    """As in Qwen2.5: the rows of unused ids and of the stop token keep a small start and move together."""
    generator = torch.Generator().manual_seed(7)
    rows = [STOP, *range(len(matrix) - PADDING_ROWS, len(matrix))]
    common = torch.randn(matrix.shape[1], generator=generator) * 0.02
    matrix[rows] = common + torch.randn(len(rows), matrix.shape[1], generator=generator) * 0.002


def zero(matrix: torch.Tensor) -> None:
    matrix[STOP] = 0


def mean(matrix: torch.Tensor) -> None:
    matrix[STOP] = matrix.mean(dim=0)


def same_as_another(matrix: torch.Tensor) -> None:
    matrix[STOP] = matrix[1] * 1.001


def started_wide(matrix: torch.Tensor) -> None:
    """Untrained rows of some size: no two are near, but together they lie apart from what was trained."""
    generator = torch.Generator().manual_seed(7)
    rows = [STOP, *range(len(matrix) - PADDING_ROWS, len(matrix))]
    matrix[rows] = torch.randn(len(rows), matrix.shape[1], generator=generator) * 0.2 * matrix.std()


def nothing(matrix: torch.Tensor) -> None:
    """Every row as random as the others."""


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """Qwen2.5's in small, as its base models have it: the template ends turns with a token that is not the eos."""
    return make_tokenizer("qwen", "qwen2_5", eos_token="<|endoftext|>")


@pytest.fixture(scope="module")
def make_base(tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """Writes a random base: ``make_base(folder, tied=..., embedding=..., head=..., stops=...)``."""

    def make(
        folder: Path,
        *,
        tied: bool = False,
        embedding: Change = never_trained,
        head: Change = never_trained,
        stops: int | list[int] | None = EOS,
        dtype: torch.dtype = torch.float32,
    ) -> Path:
        config = Qwen2Config(
            vocab_size=len(tokenizer) + PADDING_ROWS,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=512,
            initializer_range=0.1,
            tie_word_embeddings=tied,
            eos_token_id=stops,
        )
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = Qwen2ForCausalLM(config)
            embedding(model.model.embed_tokens.weight)
            if not tied:
                head(model.lm_head.weight)
        model.generation_config = GenerationConfig(eos_token_id=stops)
        model.to(dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def bases(make_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """By whether the head is tied; in bf16, the stop token never trained."""
    root = tmp_path_factory.mktemp("bases")
    return {tied: make_base(root / str(tied), tied=tied, dtype=torch.bfloat16) for tied in (True, False)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in TEXTS.items()))
    return path


def run_config(base: Path, data: Path, folder: Path, *overrides: str) -> RunConfig:
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(
        f"name: reviews\ntask: sentiment\nmodel: {{base: {base}}}\nlora: {{r: 8, lora_alpha: 16}}\n"
        f"data: {{train: {data}}}\ntrain: {{max_length: 256, per_device_train_batch_size: 6, learning_rate: 2.0e-2,\n"
        "  max_steps: 30, logging_steps: 10, warmup_steps: 0}\n",
        encoding="utf-8",
    )
    return load_config(path, [f"output_dir={folder}", *overrides])


@pytest.fixture(scope="module")
def runs(bases: dict[bool, Path], data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A run on each of ``bases`` with everything at its default. Not to be changed."""
    root = tmp_path_factory.mktemp("runs")
    for tied, base in bases.items():
        train(run_config(base, data, root / f"tied-{tied}"))
    return {tied: root / f"tied-{tied}" for tied in bases}


@pytest.mark.parametrize("target", ["vllm", "llama.cpp"])
def test_rows_that_the_target_cannot_serve_stop_the_training(
    target: str, bases: dict[bool, Path], data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"lora\.trainable_token_indices is auto") as caught:
        train(run_config(bases[False], data, tmp_path / "run", f"target={target}"))
    assert f"leave {target} out of target" in caught.value.faults[0].fix


# --- recognising ---


@pytest.mark.parametrize(
    ("change", "nearest"),
    [
        (never_trained, "unused id"),
        (zero, "zero"),
        (mean, "mean of the ordinary rows"),
        (same_as_another, "<|im_start|>"),
        (started_wide, "the middle of 16 unused rows"),
    ],
)
def test_a_row_that_was_never_trained_is_recognised(
    change: Change, nearest: str, make_base: Callable[..., Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    ref = resolve_base(str(make_base(tmp_path / "base", embedding=nothing, head=change)))
    finding = examine_stop_token(ref, tokenizer)
    assert finding is not None
    assert (finding.token, finding.token_id, finding.model_stop_ids) == ("<|im_end|>", STOP, (EOS,))
    assert finding.untrained == ("lm_head",)
    assert nearest in finding.rows[1].nearest
    chosen = choose_token_rows(ref, tokenizer, LoraSection())
    assert chosen.indices == {"lm_head": (STOP,)}
    assert "never trained" in str(chosen.message)
    assert choose_token_rows(ref, tokenizer, LoraSection(modules_to_save=("lm_head",))).indices == {}


def test_a_trained_row_is_told_and_left_alone(
    make_base: Callable[..., Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    ref = resolve_base(str(make_base(tmp_path / "base", embedding=nothing, head=nothing)))
    chosen = choose_token_rows(ref, tokenizer, LoraSection())
    assert chosen.indices == {}
    assert "<|im_end|> (id 2), the base stops at 0" in str(chosen.message)
    assert "nothing is done" in str(chosen.message)


@pytest.mark.parametrize("stops", [STOP, [EOS, STOP], None], ids=str)
def test_a_base_that_stops_there_or_says_nothing_is_not_examined(
    stops: Any, make_base: Callable[..., Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    ref = resolve_base(str(make_base(tmp_path / "base", stops=stops)))
    assert examine_stop_token(ref, tokenizer) is None
    assert choose_token_rows(ref, tokenizer, LoraSection()).message is None


def test_the_random_base_and_tiny_are_not_suspected(random_base: Path) -> None:
    for base in (str(random_base), "tiny"):
        ref = resolve_base(base)
        assert choose_token_rows(ref, load_tokenizer(ref), LoraSection()).indices == {}


def test_a_tied_head_is_examined_once(bases: dict[bool, Path], tokenizer: PreTrainedTokenizerFast) -> None:
    untrained = {tied: examine_stop_token(resolve_base(str(base)), tokenizer) for tied, base in bases.items()}
    assert {tied: found and found.untrained for tied, found in untrained.items()} == {
        True: ("embed_tokens",),
        False: ("embed_tokens", "lm_head"),
    }


def test_the_config_takes_ids_none_and_auto(bases: dict[bool, Path], tokenizer: PreTrainedTokenizerFast) -> None:
    ref = resolve_base(str(bases[False]))
    assert choose_token_rows(ref, tokenizer, LoraSection(trainable_token_indices=None)).indices == {}
    assert choose_token_rows(ref, tokenizer, LoraSection(trainable_token_indices="none")).indices == {}
    asked = LoraSection(trainable_token_indices=[5, 3])
    assert choose_token_rows(ref, tokenizer, asked).indices == {"embed_tokens": (3, 5), "lm_head": (3, 5)}
    tied = resolve_base(str(bases[True]))
    assert choose_token_rows(tied, tokenizer, asked).indices == {"embed_tokens": (3, 5)}
    for lora, pattern in (
        (LoraSection(trainable_token_indices=[3, 100_000]), "100000 is no row"),
        (LoraSection(trainable_token_indices=[3], modules_to_save=["lm_head"]), "trains lm_head whole"),
    ):
        with pytest.raises(ConfigError, match=pattern):
            choose_token_rows(ref, tokenizer, lora)


@pytest.mark.parametrize("value", ["some", "[]", "[-1]", "[1.5]", "true"])
def test_other_values_are_refused(value: str, bases: dict[bool, Path], data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainable_token_indices(.|\n)*auto, null, or a list of token ids"):
        run_config(bases[True], data, tmp_path / "run", f"lora.trainable_token_indices={value}")


# --- training ---


def finish_reasons(base: Path, adapter: Path) -> list[str]:
    engine = Engine(str(base))
    name = engine.load(str(adapter))
    conversations = [[Message("user", text)] for text in TEXTS]
    answers = engine.generate(conversations, adapter=name, sampling=Sampling(16))
    return [answer.finish_reason for answer in answers]


@pytest.mark.parametrize("tied", [True, False])
def test_only_with_its_row_trained_do_answers_end(
    tied: bool, bases: dict[bool, Path], runs: dict[bool, Path], data: Path, tmp_path: Path
) -> None:
    assert finish_reasons(bases[tied], runs[tied]) == ["stop"] * len(TEXTS)
    train(run_config(bases[tied], data, tmp_path / "without", "lora.trainable_token_indices=null"))
    assert finish_reasons(bases[tied], tmp_path / "without") == ["length"] * len(TEXTS)


def test_what_was_trained_is_told(
    bases: dict[bool, Path], runs: dict[bool, Path], data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        result = train(run_config(bases[False], data, tmp_path / "run", "train.max_steps=1"))
    assert result.trained_token_rows == {"embed_tokens": [STOP], "lm_head": [STOP]}
    assert "<|im_end|> (id 2)" in caplog.text
    assert "was never trained, so it is trained with the adapter" in caplog.text
    for tied, expected in ((True, {"embed_tokens": [STOP]}), (False, {"embed_tokens": [STOP], "lm_head": [STOP]})):
        assert json.loads((runs[tied] / "adapter_config.json").read_text())["trainable_token_indices"] == expected
        assert AdapterContract.load(runs[tied]).metrics["trained_token_rows"] == expected
        assert "trained_token_rows" in (runs[tied] / "README.md").read_text()


def test_a_resumed_run_ends_with_the_same_rows(bases: dict[bool, Path], data: Path, tmp_path: Path) -> None:
    settings = ("train.max_steps=4", "train.save_strategy=steps", "train.save_steps=2", "train.save_total_limit=5")
    config = run_config(bases[False], data, tmp_path / "whole", *settings)
    train(config)
    whole = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for name in ("qlora_kit.json", "adapter_model.safetensors"):
        (tmp_path / "part" / name).unlink()
    shutil.rmtree(tmp_path / "part" / "checkpoint-4")
    result = train(run_config(bases[False], data, tmp_path / "part", *settings), resume=True)
    assert str(result.resumed_from).endswith("checkpoint-2")
    resumed = load_file(tmp_path / "part" / "adapter_model.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    assert sum("trainable_tokens_delta" in name for name in whole) == 2


# --- loading and swapping ---


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("first", ["rows", "plain"])
def test_swapping_leaves_the_base_as_it_was(
    tied: bool, first: str, bases: dict[bool, Path], runs: dict[bool, Path], tmp_path: Path
) -> None:
    model = Qwen2ForCausalLM.from_pretrained(bases[tied], dtype=torch.float32)
    plain = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    plain.save_pretrained(tmp_path / "plain", save_embedding_layers=False)
    shutil.copytree(runs[tied], tmp_path / "rows")
    other = Path(shutil.copytree(runs[tied], tmp_path / "other"))  # the same pairs, other rows
    tensors = load_file(other / "adapter_model.safetensors")
    changed = {name: tensor * (3 if "tokens_delta" in name else 1) for name, tensor in tensors.items()}
    save_file(changed, other / "adapter_model.safetensors", {"format": "pt"})
    model = Qwen2ForCausalLM.from_pretrained(bases[tied], dtype=torch.float32)
    one = get_peft_model(model, LoraConfig(r=4, target_modules=["v_proj"], trainable_token_indices=[3]))
    one.get_input_embeddings().token_adapter.trainable_tokens_delta["default"].data.mul_(-2)
    one.save_pretrained(tmp_path / "one", save_embedding_layers=False)

    def alone(folder: Path | None) -> torch.Tensor:
        fresh = load_base_model(resolve_base(str(bases[tied])), QuantizationSection(), device=torch.device("cpu"))
        return logits(fresh if folder is None else PeftModel.from_pretrained(fresh, folder).eval())

    expected = {name: alone(tmp_path / name) for name in ("plain", "rows", "other", "one")}
    base = alone(None)
    assert (expected["rows"] - base)[..., STOP].abs().max() > 0.1
    engine = Engine(str(bases[tied]))
    second = "rows" if first == "plain" else "plain"
    for name in (first, second, "rows", "one", "plain", "other", "rows", "one", "plain"):
        engine.load(str(tmp_path / name))
        with engine.using(name) as model:
            torch.testing.assert_close(logits(model), expected[name], rtol=0, atol=1e-5)
        with engine.using(None) as model:
            assert torch.equal(logits(model), base), f"residue of {name}"


def test_rows_that_do_not_fit_are_refused(bases: dict[bool, Path], runs: dict[bool, Path], tmp_path: Path) -> None:
    engine = Engine(str(bases[False]))
    path = runs[False] / "adapter_config.json"
    for number, (indices, pattern) in enumerate(
        [
            ({"embed_tokens": [100_000], "lm_head": [2]}, "do not fit its shape"),
            ({"embed_tokens": [2], "lm_head": [2, 2]}, "trainable_token_indices is"),
            ({"embed_tokens": [2]}, r"lm_head\.token_adapter\S+ is not declared"),
        ]
    ):
        folder = Path(shutil.copytree(runs[False], tmp_path / f"bad{number}"))
        content = {**json.loads(path.read_text()), "trainable_token_indices": indices}
        (folder / "adapter_config.json").write_text(json.dumps(content))
        with pytest.raises(AdapterError, match=pattern):
            engine.load(str(folder))
    folder = Path(shutil.copytree(runs[False], tmp_path / "none"))
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({k: v for k, v in tensors.items() if "tokens" not in k}, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"trainable_tokens_delta.* is missing"):
        engine.load(str(folder))


# --- merging ---


def merged_by_peft(base: Path, adapter: Path, *, onto: str, plain: Path | None = None) -> dict[str, torch.Tensor]:
    model = Qwen2ForCausalLM.from_pretrained(base if plain is None else plain, dtype=torch.float32)
    if onto == "dequantized":
        loaded = load_base_model(resolve_base(str(base)), QuantizationSection(), device=torch.device("cpu"))
        for name, module in loaded.named_modules():
            if isinstance(module, Linear4bit):
                module_state = module.weight.quant_state
                model.get_submodule(name).weight.data = dequantize_4bit(module.weight.data, module_state).float()
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return {name: tensor.to(torch.bfloat16) for name, tensor in merged.state_dict().items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("onto", ["dequantized", "original"])
def test_a_merge_carries_the_rows(
    tied: bool, onto: Any, bases: dict[bool, Path], runs: dict[bool, Path], tmp_path: Path
) -> None:
    result = merge_adapter(runs[tied], tmp_path / "out", onto=onto)
    written, source = load_file(tmp_path / "out" / "model.safetensors"), load_file(bases[tied] / "model.safetensors")
    expected = merged_by_peft(bases[tied], runs[tied], onto=onto)
    assert written.keys() == source.keys()
    for name, tensor in written.items():
        assert torch.equal(tensor, expected[name]), name
    for name in (EMBEDDING,) if tied else (EMBEDDING, HEAD):
        changed = (written[name] != source[name]).any(dim=1).nonzero().flatten().tolist()
        assert changed == [STOP]
    assert result.verification is not None
    assert result.verification.passed
    assert result.verification.tensors.trained_rows == (1 if tied else 2)
    merged = Engine(str(tmp_path / "out"), quantization=QuantizationSection(load_in_4bit=False))
    if onto == "dequantized":
        prompt = AdapterContract.load(runs[tied]).system_prompt
        turns = [*([Message("system", prompt)] if prompt else []), Message("user", "The soup is good.")]
        assert merged.generate([turns], sampling=Sampling(16))[0].finish_reason == "stop"
        ids = merged.tokenizer.apply_chat_template(
            [{"role": turn.role, "content": turn.content} for turn in turns],
            add_generation_prompt=True,
            return_dict=False,
        )
        own = Qwen2ForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        assert int(own.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0, -1]) == STOP


def test_a_base_of_4_bit_files_has_rows_too(bases: dict[bool, Path], data: Path, tmp_path: Path) -> None:
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    )
    model = Qwen2ForCausalLM.from_pretrained(bases[False], quantization_config=settings, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    load_tokenizer(resolve_base(str(bases[False]))).save_pretrained(tmp_path / "base")
    train(run_config(tmp_path / "base", data, tmp_path / "run", "train.max_steps=1"))
    result = merge_adapter(tmp_path / "run", tmp_path / "out")
    expected = merged_by_peft(tmp_path / "base", tmp_path / "run", onto="dequantized", plain=bases[False])
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name
    assert result.verification is not None
    assert result.verification.tensors.trained_rows == 2


@pytest.mark.parametrize("row", [STOP, STOP + 1])
def test_a_wrong_row_is_caught(row: int, runs: dict[bool, Path], tmp_path: Path, monkeypatch: Any) -> None:
    write = ShardWriter.write

    def faulty(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        tensor = tensor.clone()
        if name == HEAD:
            tensor.view(torch.int16)[row, 3] ^= 1
        write(self, name, tensor)

    monkeypatch.setattr(ShardWriter, "write", faulty)
    with pytest.raises(GuardError, match=HEAD):
        merge_adapter(runs[False], tmp_path / "out")
    assert not (tmp_path / "out").exists()
