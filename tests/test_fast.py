"""The fused path gives PEFT's and TRL's losses and gradients, keeps less, computes less, and leaves no trace."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fast_models import VOCABULARY, base_model, one_pass, packed_batch, padded_batch, with_lora
from peft import PeftModel, get_peft_model_state_dict
from torch.utils.flop_counter import FlopCounterMode
from transformers.integrations.neftune import neftune_post_forward_hook
from trl import SFTConfig

from qlora_kit.fast import PIECES, FastPath, ScoredModel, fast_path
from qlora_kit.fast.segments import segment_mask
from qlora_kit.fast.unpadding import unpadded
from qlora_kit.training import TrainResult
from qlora_kit.training.checkpointed_layers import checkpoint_first_layers
from qlora_kit.training.fitting import _fast_training

ALONE = [*((piece,) for piece in PIECES if piece != "unpadding"), ("segments", "head", "unpadding")]
"""The pieces one by one, with those that one needs."""
BATCHES: dict[str, Callable[[], dict[str, torch.Tensor]]] = {"padded": padded_batch, "packed": packed_batch}


def scored(model: PeftModel, fast: FastPath) -> Callable[..., Any]:
    """What the trainer calls."""
    return model if fast.head is None else ScoredModel(model, fast.head)


def require_fused(fast: FastPath, *, but: tuple[str, ...] = ()) -> None:
    assert tuple(piece.name for piece in fast.pieces if piece.reason is not None) == but
    assert all(piece.places == piece.possible for piece in fast.pieces if piece.reason is None)


# --- losses and gradients, beside the libraries' own path ---


@pytest.mark.parametrize(
    ("family", "batch", "checkpointing", "dropout"),
    [
        ("qwen2", "padded", False, 0.0),
        ("qwen2", "packed", True, 0.3),
        ("qwen3", "padded", True, 0.0),
        ("llama", "packed", False, 0.0),
        ("mistral", "padded", True, 0.3),
    ],
)
def test_in_fp32_all_pieces_agree(family: str, batch: str, checkpointing: bool, dropout: float) -> None:
    model = with_lora(base_model(family), lora_dropout=dropout)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inputs = BATCHES[batch]()
    plain = one_pass(model, model, inputs)
    with fast_path(model) as fast:
        require_fused(fast, but=("unpadding",) if dropout else ())
        fused = one_pass(model, scored(model, fast), inputs)
    torch.testing.assert_close(fused.loss, plain.loss, rtol=1e-5, atol=0)
    assert fused.distance(plain) < 1e-5
    torch.testing.assert_close(fused.entropy, plain.entropy, rtol=1e-5, atol=1e-5)
    assert torch.equal(fused.is_top1, plain.is_top1)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("pieces", ALONE)
def test_each_piece_alone_agrees(pieces: tuple[str, ...], batch: str) -> None:
    model = with_lora(base_model(), rank_pattern={"k_proj": 2, "up_proj": 6}, use_rslora=True)
    plain = one_pass(model, model, BATCHES[batch]())
    with fast_path(model, pieces=pieces) as fast:
        require_fused(fast)
        fused = one_pass(model, scored(model, fast), BATCHES[batch]())
    torch.testing.assert_close(fused.loss, plain.loss, rtol=1e-5, atol=0)
    assert fused.distance(plain) < 1e-5


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("pieces", [*ALONE, PIECES])
def test_in_bf16_it_is_as_near_to_fp32_as_the_plain_path(pieces: tuple[str, ...], batch: str) -> None:
    """Both round, at different places: beside fp32, the fused path may not be further off than the plain one."""
    exact_model, model = (
        with_lora(base_model(dtype=dtype, initializer_range=0.05)) for dtype in (torch.float32, torch.bfloat16)
    )
    exact = one_pass(exact_model, exact_model, BATCHES[batch]())
    plain = one_pass(model, model, BATCHES[batch]())
    with fast_path(model, pieces=pieces) as fast:
        require_fused(fast)
        fused = one_pass(model, scored(model, fast), BATCHES[batch]())
    assert fused.loss.item() == pytest.approx(plain.loss.item(), rel=2e-2)
    assert fused.whole_distance(plain) < 2e-2
    assert fused.whole_distance(exact) < 1.1 * plain.whole_distance(exact)


TRAINED_IN_FP32 = [
    ("qwen2", "embed_tokens", ()),
    ("qwen2", "norm", ("projections", "mlp")),
    ("qwen2", "post_attention_layernorm", ("mlp",)),
    ("qwen3", "q_norm", ()),
]
"""What is trained beside the pairs, and the pieces that do not go with it."""


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("family", "trained", "left"), TRAINED_IN_FP32)
def test_hidden_states_may_be_wider_than_the_base(family: str, trained: str, left: tuple[str, ...], batch: str) -> None:
    """Beside a base in 16 bits, an embedding or a norm is trained in fp32, and makes hidden states in fp32."""
    base = base_model(family, dtype=torch.bfloat16, initializer_range=0.05, tie_word_embeddings=False)
    model = with_lora(base, modules_to_save=[trained])
    plain = one_pass(model, model, BATCHES[batch]())
    with fast_path(model) as fast:
        require_fused(fast, but=left)
        fused = one_pass(model, scored(model, fast), BATCHES[batch]())
    assert any(trained in name for name in fused.gradients)
    assert fused.gradients.keys() == plain.gradients.keys()
    assert fused.loss.item() == pytest.approx(plain.loss.item(), rel=2e-2)
    assert fused.whole_distance(plain) < 2e-2


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_checkpointing_of_some_layers_agrees(dtype: torch.dtype, limit: float) -> None:
    model = with_lora(base_model(dtype=dtype, initializer_range=0.05))
    plain = one_pass(model, model, padded_batch())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpoint_first_layers(model.get_base_model(), 1)
    with fast_path(model) as fast:
        fused = one_pass(model, scored(model, fast), padded_batch())
    assert fused.loss.item() == pytest.approx(plain.loss.item(), rel=limit)
    assert fused.whole_distance(plain) < limit


def first_layer_shapes(model: PeftModel) -> list[tuple[int, ...]]:
    """The shapes of the hidden states that come to the first layer from now on."""
    shapes: list[tuple[int, ...]] = []
    layer = model.get_base_model().model.layers[0]
    layer.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    return shapes


def test_padding_is_not_computed() -> None:
    """Also where each row's first token has a label, which nothing predicts, and where NEFTune adds noise."""
    model = with_lora(base_model())
    embedding: Any = model.get_input_embeddings()
    embedding.neftune_noise_alpha = 5.0
    embedding.register_forward_hook(neftune_post_forward_hook)
    batch = padded_batch()
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    plain = one_pass(model, model, batch)
    shapes = first_layer_shapes(model)
    with fast_path(model) as fast:
        require_fused(fast)
        fused = one_pass(model, scored(model, fast), batch)
    assert shapes == [(1, 17 + 12 + 5, 64)]
    torch.testing.assert_close(fused.loss, plain.loss, rtol=1e-5, atol=0)
    assert fused.distance(plain) < 1e-5
    torch.testing.assert_close(fused.entropy, plain.entropy, rtol=1e-5, atol=1e-5)
    assert fused.entropy.shape == plain.entropy.shape


def padded_on_the_left() -> dict[str, torch.Tensor]:
    return {name: tensor.flip(1) for name, tensor in padded_batch().items()}


def without_padding() -> dict[str, torch.Tensor]:
    return {name: tensor[:1] for name, tensor in padded_batch().items()}


@pytest.mark.parametrize("make", [padded_on_the_left, without_padding])
def test_other_batches_stay_as_they_are(make: Callable[[], dict[str, torch.Tensor]]) -> None:
    model, batch = with_lora(base_model()), make()
    plain = one_pass(model, model, batch)
    shapes = first_layer_shapes(model)
    with fast_path(model) as fast:
        fused = one_pass(model, scored(model, fast), batch)
    assert shapes == [(*batch["input_ids"].shape, 64)]
    assert fused.distance(plain) < 1e-5


def test_labels_in_the_padding_keep_the_padding() -> None:
    batch = padded_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert unpadded(base_model(), dict(inputs), batch["labels"]) is not None
    kept = dict(inputs)
    assert unpadded(base_model(), kept, batch["input_ids"]) is None
    assert all(kept[name] is tensor for name, tensor in inputs.items()) and kept.keys() == inputs.keys()


def test_a_batch_without_labels_counts_nothing() -> None:
    model = with_lora(base_model())
    inputs = padded_batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    with fast_path(model) as fast:
        output = scored(model, fast)(**inputs, fused_lm_head=True)
        output.log_probs.sum().backward()
    assert output.log_probs.abs().sum() == 0
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.requires_grad)


def test_frozen_adapters_get_no_gradient() -> None:
    """As gradual unfreezing leaves them; those above are trained as before."""
    model = with_lora(base_model())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and (".layers.1." in name or "mlp.up_proj.lora_B" in name))
    plain = one_pass(model, model, padded_batch())
    with fast_path(model) as fast:
        fused = one_pass(model, scored(model, fast), padded_batch())
    assert fused.distance(plain) < 1e-5


# --- what it saves ---


def saved_bytes(call: Callable[[], Any], model: PeftModel) -> int:
    """Bytes that autograd keeps for the backward pass, the parameters left out."""
    kept: dict[int, int] = {}
    own = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    held = []  # until all are counted, so that no address is used twice
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held.append(call())
    return sum(kept.values())


def test_it_keeps_at_most_six_tenths() -> None:
    model = with_lora(base_model(intermediate_size=320))  # as wide beside the model as in Qwen2.5-7B
    batch = padded_batch()
    plain = saved_bytes(lambda: model(**batch, fused_lm_head=True).log_probs, model)
    with fast_path(model) as fast:
        fused = saved_bytes(lambda: scored(model, fast)(**batch, fused_lm_head=True).log_probs, model)
    assert fused < 0.6 * plain


def addmm_flops(total: list[int], a: list[int], b: list[int], *args: Any, **kwargs: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def flops(call: Callable[[], torch.Tensor]) -> int:
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops})
    with counter:
        call().sum().backward()
    return int(counter.get_total_flops())


def test_a_checkpoint_does_not_compute_down_proj_again() -> None:
    """Of what checkpointing computes again, ``down_proj``'s product with the frozen weight is missing."""
    model = with_lora(base_model())
    batch = packed_batch()
    tokens, hidden, width, layers, r = 40, 64, 192, 2, 4
    with fast_path(model, pieces=["mlp", "projections"]) as fast:
        require_fused(fast)
        model.enable_input_require_grads()  # checkpointing does it too
        once = flops(lambda: model(**batch, fused_lm_head=True).log_probs)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        again = flops(lambda: model(**batch, fused_lm_head=True).log_probs) - once
    linears = 2 * hidden * hidden + 2 * hidden * 32 + 2 * hidden * width  # query, output, key, value, gate, up
    pairs = r * (2 * (hidden + hidden) + 2 * (hidden + 32) + 2 * (hidden + width) + (width + hidden))
    assert again == 2 * tokens * layers * (linears + pairs)


def test_right_padding_and_packing_need_no_mask_and_left_padding_does() -> None:
    def mask(attention_mask: torch.Tensor | None, **more: Any) -> torch.Tensor | None:
        return segment_mask(attention_mask=attention_mask, **{"batch_size": 1, "q_length": 4, "kv_length": 4} | more)

    assert mask(torch.tensor([[True, True, True, False]])) is None
    assert mask(None, allow_is_causal_skip=False) is None
    assert mask(None, batch_size=2, allow_is_causal_skip=False) is not None
    left = mask(torch.tensor([[False, True, True, True]]))
    assert left is not None and left.shape == (1, 1, 4, 4) and not left[0, 0, 3, 0]
    step = mask(torch.tensor([[True, True, False, True]]), q_length=1, q_offset=3)
    assert step is not None and step[0, 0, 0].tolist() == [True, True, False, True]


# --- no trace ---


def test_it_has_the_same_names_inside_and_is_gone_outside(tmp_path: Path) -> None:
    model = with_lora(base_model())
    base = model.get_base_model()
    modules, names = list(model.modules()), list(model.state_dict())
    adapter = get_peft_model_state_dict(model)

    def use_and_fail() -> None:
        with fast_path(model) as fast:
            require_fused(fast)
            assert list(model.state_dict()) == names
            model.save_pretrained(tmp_path)
            assert base.config._attn_implementation != "sdpa"
            raise KeyError

    with pytest.raises(KeyError):
        use_and_fail()
    assert all(before is after for before, after in zip(modules, model.modules(), strict=True))
    assert base.config._attn_implementation == "sdpa"
    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(base_model(), tmp_path))
    assert loaded.keys() == adapter.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in adapter.items())


def test_answers_inside_are_the_same() -> None:
    """Generation with a cache, rows padded on the left: as the evaluation of a run does it."""
    model = with_lora(base_model()).eval()
    ids = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(input_ids=ids, attention_mask=mask, **options)
    with fast_path(model):
        assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **options), plain)
        with model.disable_adapter():
            bare = model(input_ids=ids).logits
    with model.disable_adapter():
        torch.testing.assert_close(bare, model(input_ids=ids).logits)


@pytest.mark.parametrize("batch", BATCHES)
def test_gradients_in_eval_mode_are_the_same(batch: str) -> None:
    """As someone takes them who asks which inputs matter; the layers are called themselves then."""
    model = with_lora(base_model(), lora_dropout=0.3).eval()
    plain = one_pass(model, model, BATCHES[batch]())
    with fast_path(model) as fast:
        fused = one_pass(model, scored(model, fast), BATCHES[batch]())
    torch.testing.assert_close(fused.loss, plain.loss, rtol=1e-5, atol=0)
    assert fused.distance(plain) < 1e-5


def test_a_switched_off_adapter_is_off_in_training_too() -> None:
    model = with_lora(base_model())
    with fast_path(model, pieces=["mlp", "projections"]), model.disable_adapter():
        fused = model(**padded_batch()).logits
    with model.disable_adapter():
        plain = model(**padded_batch()).logits
    torch.testing.assert_close(fused, plain)


# --- what it leaves alone ---


def refused(model: PeftModel) -> dict[str, str]:
    with fast_path(model) as fast:
        return {piece.name: piece.reason for piece in fast.pieces if piece.reason is not None}


def test_what_it_does_not_know_stays_plain_with_a_reason() -> None:
    dora = refused(with_lora(base_model(), use_dora=True))
    assert dora == {"projections": "q_proj uses DoRA", "mlp": "gate_proj uses DoRA"}
    some = refused(with_lora(base_model(), target_modules=["q_proj", "v_proj"]))
    assert some["projections"].startswith("k_proj is not a 4-bit layer") and "gate_proj" in some["mlp"]
    assert set(refused(with_lora(base_model(), modules_to_save=["lm_head"]))) == {"head", "unpadding"}
    assert set(refused(with_lora(base_model("mistral", sliding_window=8)))) == {"segments", "unpadding"}
    assert set(refused(with_lora(base_model(), lora_dropout=0.1))) == {"unpadding"}
    assert set(refused(with_lora(base_model(attention_dropout=0.1)))) == {"unpadding"}
    assert set(refused(with_lora(base_model(hidden_act="gelu")))) == {"mlp"}
    assert "bias" in refused(with_lora(base_model(), bias="all"))["projections"]


def test_other_architectures_stay_plain() -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    reasons = refused(with_lora(GPTNeoXForCausalLM(config)))
    assert set(reasons) == set(PIECES)
    assert all("GPTNeoXForCausalLM" in reason for reason in reasons.values())


def test_some_layers_alone_can_be_fused() -> None:
    model = with_lora(base_model(), layers_to_transform=[1], target_modules=["gate_proj", "up_proj", "down_proj"])
    plain = one_pass(model, model, padded_batch())
    with fast_path(model) as fast:
        pieces = {piece.name: piece for piece in fast.pieces}
        fused = one_pass(model, scored(model, fast), padded_batch())
    assert (pieces["mlp"].places, pieces["mlp"].possible) == (1, 2)
    assert pieces["projections"].places == 0
    assert fused.distance(plain) < 1e-5


# --- in a run ---


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.label_smoothing_factor=0.1", "train.neftune_noise_alpha=5"),
        ("train.neftune_noise_alpha=5", "train.gradient_accumulation_steps=2"),
        ("train.loss_type=dft", "train.packing=true", "train.per_device_train_batch_size=2"),
        ("train.gradient_checkpointing=true", "lora.lora_dropout=0.1", "train.gradient_accumulation_steps=2"),
    ],
)
def test_a_run_is_the_run_by_the_libraries_own_path(
    start_run: Callable[..., TrainResult], caplog: pytest.LogCaptureFixture, overrides: tuple[str, ...]
) -> None:
    with caplog.at_level(logging.INFO):
        fused = start_run("train.max_steps=4", *overrides, name="fused")
    assert "fused are projections in 2 of 2 layers, mlp in 2 of 2 layers, segments, head" in caplog.text
    plain = start_run("train.max_steps=4", "train.fast=off", *overrides, name="plain")
    figures = ("loss", "eval_loss", "entropy", "mean_token_accuracy", "grad_norm")
    pairs = [
        (entry[key], other[key])
        for entry, other in zip(fused.history, plain.history, strict=True)
        for key in figures
        if key in entry
    ]
    assert len(pairs) > 12
    for mine, theirs in pairs:
        assert mine == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("key", ["train.torch_compile", "train.activation_offloading"])
def test_what_was_never_tried_together_stays_plain(caplog: pytest.LogCaptureFixture, key: str) -> None:
    arguments = SFTConfig(use_cpu=True, report_to="none", **{key.removeprefix("train."): True})
    trainer: Any = SimpleNamespace(fast=None)
    with _fast_training(trainer, with_lora(base_model()), arguments, mode="on"):
        assert trainer.fast is None
    assert f"train.fast: nothing is fused: {key} is set" in caplog.messages


def test_a_run_says_what_stays_plain(start_run: Callable[..., TrainResult], caplog: pytest.LogCaptureFixture) -> None:
    start_run("train.max_steps=1", "quantization.load_in_4bit=false")
    assert "mlp in 2 of 2 layers (gate_proj is not a 4-bit layer with a LoRA pair)" in caplog.text
