"""The input embedding on the host: the same bits in training, its rows alone on the device, refused where it cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from qlora_kit.base_files import BaseRef
from qlora_kit.config import LoraSection, load_config
from qlora_kit.errors import ConfigError, Interrupted
from qlora_kit.models import attach_lora
from qlora_kit.training import TrainResult
from qlora_kit.training.host_embedding import (
    HostEmbedding,
    put_embedding_on_host,
    require_frozen_rows,
    require_host_embedding_possible,
)

ON_HOST = "train.embedding_on_host=true"
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def small_model(*, tied: bool = False, bfloat16: bool = False) -> PreTrainedModel:
    config = Qwen2Config(vocab_size=60, num_key_value_heads=1, tie_word_embeddings=tied, **SIZES)
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config).to(torch.bfloat16 if bfloat16 else torch.float32)


def adapted_on_host(*, bfloat16: bool = False) -> PeftModel:
    model = small_model(bfloat16=bfloat16)
    put_embedding_on_host(model)
    return attach_lora(model, LoraSection(r=4)).train()


def written(folder: Path) -> tuple[bytes, list[object]]:
    """The adapter's bytes, and every logged figure that is no time."""
    metrics = json.loads((folder / "metrics.json").read_text())
    history = [
        {key: value for key, value in line.items() if "runtime" not in key and "per_second" not in key}
        for line in metrics["history"]
    ]
    return (folder / "adapter_model.safetensors").read_bytes(), [history, metrics["stop_rate"]]


# --- in training ---


def test_a_run_gives_the_same_bytes_and_answers(
    trained_run: tuple[Path, TrainResult], start_run: Callable[..., TrainResult], caplog: pytest.LogCaptureFixture
) -> None:
    found = start_run(ON_HOST)
    assert written(Path(found.output_dir)) == written(trained_run[0])
    assert "saves nothing here" in caplog.text


@pytest.mark.parametrize("by", ["the fused path", "the libraries' path"])
def test_a_stopped_run_goes_on_to_the_same_bytes_with_it_or_without(
    by: str, start_run: Callable[..., TrainResult], stop_at: Callable[..., object]
) -> None:
    given = ["train.max_steps=4", "train.neftune_noise_alpha=5", "train.metric_for_best_model=accuracy"]
    given += ["train.metric_rows=3", "eval.report_samples=1", "eval.stop_rate_rows=2"]
    given += ["train.eval_strategy=steps", "train.eval_steps=2", "train.save_strategy=steps", "train.save_steps=2"]
    if by != "the fused path":
        given += ["train.fast=off", "train.gradient_checkpointing=true", "quantization.load_in_4bit=false"]
    whole = start_run(*given, name="whole")
    with pytest.raises(Interrupted):
        start_run(*given, ON_HOST, name="stopped", progress=stop_at(3))
    still = (ON_HOST,) if by == "the fused path" else ()  # the setting may change: no bit depends on it
    both = start_run(*given, *still, name="stopped", resume=True)
    assert written(Path(both.output_dir)) == written(Path(whole.output_dir))
    assert both.task_metric == whole.task_metric


# --- on a device of its own ---


def test_ids_of_a_gpu_are_looked_up_on_the_host_and_the_rows_come_back() -> None:
    """torch's fake tensors know devices that are not there, and refuse what would mix two."""
    with FakeTensorMode():
        weight = torch.empty(60, 32, device="cuda:0", dtype=torch.bfloat16)
        moved = HostEmbedding(torch.nn.Embedding(60, 32, _weight=weight))
        ids = torch.zeros(2, 12, dtype=torch.long, device="cuda:0")
        rows = moved(ids)
        assert (moved.rows.device.type, moved.device_of_rows.device.type) == ("cpu", "cuda")
        assert (rows.device.type, rows.shape, rows.dtype) == ("cuda", (2, 12, 32), torch.bfloat16)
        with pytest.raises(RuntimeError, match="on the same device"):
            torch.nn.functional.embedding(ids, moved.rows)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_the_rest_of_the_model_trains_on_a_device_of_its_own(bfloat16: bool) -> None:
    """On `meta`, which holds shapes alone and refuses to compute with tensors of the host."""
    model = adapted_on_host(bfloat16=bfloat16).to("meta")
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, HostEmbedding)
    assert (model.get_base_model().device.type, model.get_base_model().dtype) == ("meta", embedding.rows.dtype)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.enable_input_require_grads()
    rows = embedding(torch.arange(24).reshape(2, 12))
    assert (rows.is_meta, rows.requires_grad, embedding.rows.device.type) == (True, True, "cpu")
    model(inputs_embeds=rows, attention_mask={"full_attention": None}, use_cache=False).logits.sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is not None and parameter.grad.is_meta for parameter in trained)


def test_the_embedding_looks_up_what_torchs_own_does() -> None:
    plain, moved = small_model(), small_model()
    put_embedding_on_host(moved)
    ids = torch.tensor([[3, 1, 59], [0, 1, 2]])
    assert torch.equal(moved.get_input_embeddings()(ids), plain.get_input_embeddings()(ids))
    assert torch.equal(moved(ids).logits, plain(ids).logits)
    assert moved.num_parameters() == plain.num_parameters() - 60 * 32


def test_nothing_that_moves_or_saves_parameters_meets_it() -> None:
    model = adapted_on_host()
    assert sum(tensor.numel() for name, tensor in model.state_dict().items() if "embed_tokens" in name) == 0
    rows = model.get_input_embeddings().rows
    model.half().to("meta")
    assert model.get_input_embeddings().rows is rows


# --- what is refused ---


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (["lora.modules_to_save=[embed_tokens]"], "the lora section trains it"),
        (["lora.target_modules=[q_proj,embed_tokens]"], "the lora section trains it"),
        ([r"lora.target_modules='.*\.(embed_tokens|q_proj)'"], "the lora section trains it"),
        (["lora.trainable_token_indices=[5]"], "the lora section trains it"),
        (["train.shard_base=true"], "shard_base splits the embedding"),
    ],
)
def test_what_it_does_not_go_with_is_refused(given: list[str], what: str, run_yaml: Path, random_base: Path) -> None:
    ref = BaseRef("base", random_base)
    require_host_embedding_possible(load_config(run_yaml, given), ref)
    require_host_embedding_possible(load_config(run_yaml, [ON_HOST]), ref)
    with pytest.raises(ConfigError, match=what):
        require_host_embedding_possible(load_config(run_yaml, [ON_HOST, *given]), ref)


def test_rows_that_the_kit_itself_would_train_are_refused(run_yaml: Path) -> None:
    rows = {"embed_tokens": (3,)}
    require_frozen_rows(load_config(run_yaml), rows)
    require_frozen_rows(load_config(run_yaml, [ON_HOST]), {})
    with pytest.raises(ConfigError, match="trainable_token_indices"):
        require_frozen_rows(load_config(run_yaml, [ON_HOST]), rows)


def test_a_tied_head_is_refused_before_and_after_loading(run_yaml: Path, tmp_path: Path) -> None:
    model = small_model(tied=True)
    model.config.save_pretrained(tmp_path)
    config = load_config(run_yaml, [ON_HOST])
    with pytest.raises(ConfigError, match="the head of base is its embedding"):
        require_host_embedding_possible(config, BaseRef("base", tmp_path))
    with pytest.raises(ConfigError, match="is its embedding"):
        put_embedding_on_host(model)


def test_an_embedding_that_does_more_than_look_up_is_refused() -> None:
    class Scaled(torch.nn.Embedding):
        pass

    model = small_model()
    model.set_input_embeddings(Scaled(60, 32))
    with pytest.raises(ConfigError, match="is a Scaled"):
        put_embedding_on_host(model)
