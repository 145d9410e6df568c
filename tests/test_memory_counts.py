"""The planner's formulas against counted bytes: tensors of a loaded 4-bit base, of its optimizer, of autograd."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.optim import AdamW as BitsAndBytesAdamW
from torch.profiler import ProfilerActivity, profile
from transformers import Adafactor, AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from qlora_kit.architecture import read_architecture
from qlora_kit.base_files import BaseRef
from qlora_kit.config import LoraSection, QuantizationSection, load_config
from qlora_kit.fast import PIECES, ScoredModel, fast_path
from qlora_kit.fast.head import TILE_LOGITS
from qlora_kit.four_bit import linear4bit_modules
from qlora_kit.memory import activations, fused, parts
from qlora_kit.memory.optimizers import optimizer_bytes
from qlora_kit.memory.workload import Workload, lora_pairs, workload_of
from qlora_kit.models import adapter_bytes_at_most, attach_lora, load_base_model
from qlora_kit.training.checkpointed_layers import checkpoint_first_layers
from qlora_kit.training.guarded_trainer import GuardedTrainer
from qlora_kit.training.run import train

CPU = torch.device("cpu")
SHAPE = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
BASES: dict[str, dict[str, Any]] = {
    "qwen2": {**SHAPE, "model_type": "qwen2", "num_hidden_layers": 3, "vocab_size": 500},
    "qwen3": {**SHAPE, "model_type": "qwen3", "num_hidden_layers": 2, "vocab_size": 300, "head_dim": 32},
    "llama": {  # all sizes odd to blocks of 64 and 256, tied, no grouped heads
        "model_type": "llama", "num_hidden_layers": 2, "vocab_size": 131, "hidden_size": 36, "intermediate_size": 52,
        "num_attention_heads": 3, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def any_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are counted here, also of layers that a CPU would compute wrongly."""
    monkeypatch.setattr("qlora_kit.models.refuse_wrong_cpu_layers", lambda model: None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base with random weights for each of ``BASES``."""
    made = {}
    for name, config in BASES.items():
        made[name] = tmp_path_factory.mktemp(name)
        settings = {key: value for key, value in config.items() if key != "model_type"}
        AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **settings)).save_pretrained(
            made[name]
        )
    return made


def prepare(
    folder: Path, *, lora: LoraSection, dtype: str, checkpointing: bool, **changes: Any
) -> tuple[Any, Workload]:
    """The model as training has it, and its workload."""
    quantization = QuantizationSection(bnb_4bit_compute_dtype=dtype, **changes)
    model = attach_lora(load_base_model(BaseRef("base", folder), quantization, device=CPU), lora)
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data  # as training keeps it
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    config = json.loads((folder / "config.json").read_text())
    architecture = read_architecture(config, where="config.json")
    workload = Workload(
        architecture=architecture,
        layers=lora_pairs(architecture, lora),
        batch_size=2,
        length=24,
        checkpointing=checkpointing,
        compute_bytes=2 if dtype == "bfloat16" else 4,
        device="cpu",
        dropout=lora.lora_dropout > 0,
        double_quant=quantization.bnb_4bit_use_double_quant,
    )
    return model.train(), workload


def storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Address to size of each storage, once."""
    kept = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}


def weight_tensors(model: torch.nn.Module) -> Iterator[Any]:
    """Parameters, buffers and everything that quantization keeps beside them."""
    yield from model.parameters()
    yield from model.buffers()
    yield from (vars(module).get("original_inv_freq") for module in model.modules())
    for module in linear4bit_modules(model).values():
        state = module.weight.quant_state
        yield from (state.absmax, state.code, state.offset)
        if state.state2 is not None:
            yield from (state.state2.absmax, state.state2.code)


@contextmanager
def counting_saved(model: torch.nn.Module) -> Iterator[dict[int, int]]:
    """Storages that autograd keeps for the backward pass inside the block, without the model's own."""
    own, saved, held = storages(weight_tensors(model)), {}, []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own and address not in saved and tensor.numel():
            saved[address] = tensor.untyped_storage().nbytes()
            held.append(tensor)  # else the address could be used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved


def forward(model: Any, workload: Workload) -> torch.Tensor:
    """The loss as TRL computes it, on a batch with one padded row if there are two.

    Where the layers see no padding, as many tokens as the workload has are left without it.
    """
    rows, length = workload.batch_size, workload.length + (workload.in_one_row and workload.batch_size > 1)
    ids = torch.arange(rows * length).reshape(rows, length) % 50
    mask, labels = torch.ones_like(ids), ids.clone()
    if length > workload.length:
        mask[0, -rows:] = 0
        labels[0, -rows:] = -100
    elif rows > 1:
        mask[0, -3:] = 0
    assert not workload.in_one_row or int(mask.sum()) == workload.tokens
    with torch.autocast("cpu", torch.bfloat16, enabled=workload.compute_bytes == 2):
        output = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True, num_items_in_batch=1)
    return -output.log_probs.sum()


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT asks whether autocast is on for CUDA, and casts to fp32 elsewhere; let it take the GPU's path."""
    original = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: original(*device) if device else True)


# --- what stays ---


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("base", BASES)
def test_weights_take_what_the_loaded_tensors_take(base: str, double_quant: bool, folders: dict[str, Path]) -> None:
    quantization = QuantizationSection(bnb_4bit_use_double_quant=double_quant)
    model = load_base_model(BaseRef(base, folders[base]), quantization, device=CPU)
    config = json.loads((folders[base] / "config.json").read_text())
    architecture = read_architecture(config, where="config.json")
    workload = Workload(
        architecture, layers=(), batch_size=1, length=1, compute_bytes=4, device="cpu", double_quant=double_quant
    )
    predicted = parts.linear_bytes(workload) + parts.embedding_bytes(workload) + parts.small_bytes(workload)
    assert predicted == sum(storages(weight_tensors(model)).values())


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("adamw_torch", torch.optim.AdamW),
        ("adamw_8bit", lambda parameters: BitsAndBytesAdamW(parameters, optim_bits=8)),
        ("adafactor", lambda parameters: Adafactor(parameters, scale_parameter=False, relative_step=False, lr=1e-3)),
        ("sgd", torch.optim.SGD),
    ],
)
def test_adapter_gradients_and_optimizer_take_what_their_tensors_take(
    name: str, make: Any, folders: dict[str, Path]
) -> None:
    lora = LoraSection(r=66, target_modules=["q_proj", "down_proj"])  # tensors above and below bitsandbytes' 4,096
    model, workload = prepare(folders["qwen2"], lora=lora, dtype="float32", checkpointing=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make(trained)
    forward(model, workload).backward()
    optimizer.step()
    workload = workload.with_(optim=name)
    assert parts.adapter_bytes(workload) == sum(storages(trained).values())
    assert parts.gradient_bytes(workload) == sum(storages(parameter.grad for parameter in trained).values())
    state = [entry for tensor_state in optimizer.state.values() for entry in tensor_state.values()]
    # bitsandbytes' two tables of 256 values are shared by all tensors
    tables = 2 * 1024 if name == "adamw_8bit" else 0
    assert optimizer_bytes(workload) == sum(storages(state).values()) - tables


# --- what autograd keeps ---


@pytest.mark.parametrize("rows", [1, 2], ids=["one row", "padded rows"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("base", BASES)
def test_saved_activations_are_counted_exactly_in_fp32(
    base: str, checkpointing: bool, rows: int, folders: dict[str, Path]
) -> None:
    lora = LoraSection(r=8)
    model, workload = prepare(folders[base], lora=lora, dtype="float32", checkpointing=checkpointing)
    assert_exact(model, workload.with_(batch_size=rows, length=17 + rows))


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(
    ("base", "checkpointing", "dropout", "rows"),
    [("qwen2", False, 0.0, 1), ("qwen2", True, 0.0, 2), ("qwen3", False, 0.1, 2), ("llama", False, 0.0, 2)],
)
def test_saved_activations_are_counted_exactly_under_autocast(
    base: str, checkpointing: bool, dropout: float, rows: int, folders: dict[str, Path]
) -> None:
    lora = LoraSection(r=8, lora_dropout=dropout, rank_pattern={"down_proj": 4})
    model, workload = prepare(folders[base], lora=lora, dtype="bfloat16", checkpointing=checkpointing)
    assert_exact(model, workload.with_(batch_size=rows, length=40))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(("rows", "dtype"), [(1, "float32"), (2, "float32"), (2, "bfloat16")])
def test_saved_activations_of_some_checkpointed_layers_are_counted_exactly(
    layers: int, rows: int, dtype: str, folders: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    if dtype == "bfloat16":
        request.getfixturevalue("as_on_a_gpu")
    model, workload = prepare(folders["qwen2"], lora=LoraSection(r=8), dtype=dtype, checkpointing=True)
    checkpoint_first_layers(model, layers)
    workload = workload.with_(batch_size=rows, length=30 + rows, checkpointed_layers=layers)
    assert_exact(model, workload)
    assert activations.saved_bytes(workload) < activations.saved_bytes(workload.with_(checkpointing=False))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("base", "changes", "checkpointing", "rows"),
    [
        ("qwen2", {}, False, 1),
        ("qwen2", {}, False, 2),
        ("qwen2", {}, True, 2),
        ("qwen3", {"lora_dropout": 0.1, "rank_pattern": {"down_proj": 4}}, False, 2),
        ("llama", {"lora_dropout": 0.1}, False, 1),
        ("qwen2", {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]}, False, 2),
    ],
    ids=["one row", "padded rows", "checkpointed", "dropout", "no grouped heads", "attention alone"],
)
def test_what_the_fused_path_keeps_is_counted_exactly(
    base: str,
    changes: dict[str, Any],
    checkpointing: bool,
    rows: int,
    dtype: str,
    folders: dict[str, Path],
    request: pytest.FixtureRequest,
) -> None:
    if dtype == "bfloat16":
        request.getfixturevalue("as_on_a_gpu")
    lora = LoraSection(r=8, **changes)
    model, workload = prepare(folders[base], lora=lora, dtype=dtype, checkpointing=checkpointing)
    plain = workload.with_(batch_size=rows, length=40)
    with fast_path(model) as fast:
        assert fast.head is not None
        assert_exact(model, plain.with_(fast=True), scored=ScoredModel(model, fast.head))
    assert activations.saved_bytes(plain.with_(fast=True)) < activations.saved_bytes(plain)
    assert_exact(model, plain)


def test_the_fused_heads_tile_is_as_large_as_the_plan_says() -> None:
    assert fused.TILE_LOGITS == TILE_LOGITS


@pytest.mark.parametrize("base", ["qwen2", "llama"])  # the second is tied: PEFT trains a copy of the embedding
def test_a_head_that_is_trained_whole_is_counted_and_not_fused(
    base: str, folders: dict[str, Path], run_yaml: Path
) -> None:
    run = load_config(run_yaml, ["lora.modules_to_save=[lm_head]", "train.fast=on"])
    config = json.loads((folders[base] / "config.json").read_text())
    architecture = read_architecture(config, where="config.json")
    counted = workload_of(run, architecture, base_config=config, device="cpu")
    model = attach_lora(load_base_model(BaseRef("base", folders[base]), run.quantization, device=CPU), run.lora)
    assert counted.trainable == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    with fast_path(model) as fast:
        assert (fast.head is not None) is counted.fused_head is False


@pytest.mark.parametrize("base", ["qwen2", "qwen3"])
@pytest.mark.parametrize("saved", ["[norm]", "[input_layernorm]", "[embed_tokens,model.norm]", "[tokens]"])
def test_modules_that_are_trained_whole_are_counted_as_peft_finds_them(
    base: str, saved: str, folders: dict[str, Path], run_yaml: Path
) -> None:
    """By the ends of their names: ``norm`` is every layer's norms, too."""
    run = load_config(run_yaml, [f"lora.modules_to_save={saved}"])
    config = json.loads((folders[base] / "config.json").read_text())
    counted = workload_of(run, read_architecture(config, where="config.json"), base_config=config, device="cpu")
    ref = BaseRef("base", folders[base])
    model = attach_lora(load_base_model(ref, run.quantization, device=CPU), run.lora)
    assert counted.trainable == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert adapter_bytes_at_most(ref, run.lora) >= 4 * counted.trainable
    assert counted.embedding_is_movable is ("tokens" not in saved)


def assert_exact(model: Any, workload: Workload, *, scored: Any = None) -> None:
    with counting_saved(model) as saved:
        forward(model if scored is None else scored, workload)
    predicted = activations.saved_bytes(workload)
    if workload.recomputed < len(workload.layers):  # checkpointed blocks' arguments hold them, out of the hooks' sight
        boolean_mask = workload.batch_size * workload.length**2 if workload.masked else 0  # SDPA keeps its own copy
        predicted += activations.shared_bytes(workload) - boolean_mask
    if workload.in_one_row and workload.checkpointing:  # embeddings then get a gradient, for which their mask is kept
        predicted += workload.batch_size * (workload.length + 1)
    assert sum(saved.values()) == predicted


@pytest.mark.parametrize(("fast", "layers"), [("off", 0), ("off", 1), ("auto", 0)])
def test_the_training_run_itself_keeps_what_the_workload_of_its_config_says(
    fast: str, layers: int, run_yaml: Path, random_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte; the fused path keeps nothing of padding, and something of supervised tokens alone: the plan all."""
    counted: list[tuple[tuple[int, int], int, int, int]] = []
    original = GuardedTrainer.compute_loss

    def count(self: GuardedTrainer, model: Any, inputs: dict[str, Any], *args: Any, **more: Any) -> Any:
        shape, mask, labels = tuple(inputs["input_ids"].shape), inputs["attention_mask"], inputs["labels"]
        with counting_saved(model) as saved:
            loss = original(self, model, inputs, *args, **more)
        if model.training:
            supervised = int((labels[:, 1:] != -100).sum())
            counted.append((shape, int(mask.sum()), supervised, sum(saved.values())))
        return loss

    monkeypatch.setattr(GuardedTrainer, "compute_loss", count)
    some = ["train.gradient_checkpointing=true", f"train.checkpointed_layers={layers}"] if layers else []
    own = [f"output_dir={tmp_path / 'run'}", "train.max_steps=1", "data.validation=", f"train.fast={fast}"]
    config = load_config(run_yaml, [*own, *some])
    train(config)
    base_config = json.loads((random_base / "config.json").read_text())
    architecture = read_architecture(base_config, where="config.json")
    workload = workload_of(config, architecture, base_config=base_config, device="cpu")
    ((rows, length), tokens, supervised, saved_bytes) = counted[0]
    assert 0 < supervised < tokens < rows * length
    assert workload.fast is workload.in_one_row is (fast == "auto")
    if fast == "off":
        workload = workload.with_(batch_size=rows, length=length)
        predicted = activations.saved_bytes(workload) + activations.shared_bytes(workload) - rows * length**2
    else:
        workload = workload.with_(batch_size=1, length=tokens, packing=True)
        few = workload.with_(length=supervised + 1)
        predicted = activations.saved_bytes(workload) + activations.shared_bytes(workload)
        predicted += fused.head_bytes(few) - fused.head_bytes(workload)
    assert saved_bytes == pytest.approx(predicted, abs=64)  # and the trainer's own scalars


# --- the peak ---


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("layers", [0, 1, 3], ids=["kept", "one checkpointed", "checkpointed"])
def test_the_peak_of_a_pass_is_what_the_allocator_saw(
    layers: int, fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every allocation and release of one forward and backward pass, added up; the loss is made small beside them."""
    monkeypatch.setattr("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", 64)
    config = {**SHAPE, "hidden_size": 128, "intermediate_size": 640, "vocab_size": 64, "num_hidden_layers": 3}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **config)).save_pretrained(tmp_path)
    model, workload = prepare(tmp_path, lora=LoraSection(r=8), dtype="bfloat16", checkpointing=layers > 0)
    checkpoint_first_layers(model, layers)
    workload = workload.with_(length=256, batch_size=1, checkpointed_layers=layers or None, fast=fast)
    with fast_path(model, pieces=PIECES if fast else ()) as path:
        scored = model if path.head is None else ScoredModel(model, path.head)
        forward(scored, workload).backward()  # gradients exist from here on
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            forward(scored, workload).backward()
    assert profiled.profiler is not None
    events = profiled.profiler.kineto_results.events()
    live = peak = 0
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        live += size
        peak = max(peak, live)
    assert activations.peak_bytes_of_pass(workload) == pytest.approx(peak, rel=0.05)
