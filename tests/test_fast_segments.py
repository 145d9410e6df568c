"""Packed conversations attend to themselves alone, whichever kernel computes it, and no mask is made for that."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fast_models import base_model, one_pass, packed_batch, padded_batch, with_lora
from torch.nn.attention import varlen

from qlora_kit.fast import ScoredModel, fast_path, segments
from qlora_kit.fast.segments import segment_attention, takes_groups, takes_varlen

LENGTHS = (9, 1, 20, 10)
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)


def heads(count: int, *, seed: int, width: int = 16) -> torch.Tensor:
    """Of a row of all conversations: (1, count, T, width), as the transposed output of a projection."""
    source = torch.Generator().manual_seed(seed)
    return torch.randn((1, sum(LENGTHS), count, width), generator=source, dtype=torch.float64).transpose(1, 2)


def by_mask(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scaling: float) -> torch.Tensor:
    """The same by one product with a mask of length squared, in plain torch: (1, T, heads, width)."""
    owner = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    seen = (owner[:, None] == owner[None, :]).tril()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    weights = (query @ key.transpose(2, 3) * scaling).masked_fill(~seen, -torch.inf).softmax(dim=-1)
    return (weights @ value).transpose(1, 2)


def documented_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What torch's documentation says of ``varlen_attn``, for tensors (T, heads, width), without its kernel."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert enable_gqa or query.shape[1] == key.shape[1]
    lengths = cu_seq_q.diff().tolist()
    assert (max(lengths), max(cu_seq_k.diff().tolist())) == (max_q, max_k)
    assert sum(lengths) == query.shape[0]
    assert window_size == (-1, 0)  # back to the beginning, nothing ahead
    groups = query.shape[1] // key.shape[1]
    outputs = []
    for q, k, v in zip(*(part.split(lengths) for part in (query, key, value)), strict=True):
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * (scale if scale is not None else q.shape[-1] ** -0.5)
        seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril()
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(dim=-1), v))
    return torch.cat(outputs)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As where torch's kernel can be called, which is stood in for; how often it was."""
    calls: list[int] = []

    def called(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return documented_varlen(*args, **kwargs)

    monkeypatch.setattr(segments, "takes_varlen", lambda query, *, dropout: not dropout)
    monkeypatch.setattr(varlen, "varlen_attn", called)
    return calls


@pytest.mark.parametrize("kernel", ["one by one", "all at once", "without groups"])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_values_and_gradients_are_those_of_a_mask(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, kernel: str, kv_heads: int
) -> None:
    calls = request.getfixturevalue("on_a_gpu") if kernel == "all at once" else []
    if kernel == "without groups":
        monkeypatch.setattr(segments, "takes_groups", lambda query: False)
    inputs = [heads(count, seed=seed).requires_grad_() for seed, count in enumerate((4, kv_heads, kv_heads))]
    output, _ = segment_attention(torch.nn.Module(), *inputs, None, scaling=0.3, position_ids=POSITIONS)
    expected = by_mask(*inputs, scaling=0.3)
    torch.testing.assert_close(output, expected)
    weights = heads(4, seed=7).transpose(1, 2)
    mine = torch.autograd.grad((output * weights).sum(), inputs)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs)
    for gradient, reference in zip(mine, theirs, strict=True):
        torch.testing.assert_close(gradient, reference)
    assert len(calls) == (kernel == "all at once")


@pytest.mark.parametrize("batch", [packed_batch, padded_batch])
@pytest.mark.parametrize("dropout", [0.0, 0.3])  # with dropout, padding stays
def test_old_gpus_get_as_many_heads_of_keys_as_of_queries(
    monkeypatch: pytest.MonkeyPatch, batch: Callable[[], dict[str, torch.Tensor]], dropout: float
) -> None:
    """Their kernels take nothing else, and torch's plain formula would hold weights of length squared."""
    model = with_lora(base_model(), lora_dropout=dropout)
    plain = one_pass(model, model, batch())
    heads_of: list[tuple[int, int, bool]] = []
    right = torch.nn.functional.scaled_dot_product_attention

    def noted(q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        heads_of.append((q.shape[1], k.shape[1], kwargs["enable_gqa"]))
        return right(q, k, *args, **kwargs)

    monkeypatch.setattr(segments, "takes_groups", lambda query: False)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    with fast_path(model) as fast:
        assert fast.head is not None
        fused = one_pass(model, ScoredModel(model, fast.head), batch())
    assert set(heads_of) == {(2, 2, False)}
    torch.testing.assert_close(fused.loss, plain.loss, rtol=1e-5, atol=0)
    assert fused.distance(plain) < 1e-5


def test_dropout_takes_the_way_that_has_it(on_a_gpu: list[int]) -> None:
    inputs = [heads(4, seed=seed) for seed in range(3)]
    torch.manual_seed(0)
    output, _ = segment_attention(torch.nn.Module(), *inputs, None, scaling=0.3, dropout=0.9, position_ids=POSITIONS)
    assert on_a_gpu == []
    assert not torch.equal(output, by_mask(*inputs, scaling=0.3))


def test_a_model_trains_with_it(on_a_gpu: list[int]) -> None:
    model = with_lora(base_model())
    plain = one_pass(model, model, packed_batch())
    with fast_path(model) as fast:
        assert fast.head is not None
        fused = one_pass(model, ScoredModel(model, fast.head), packed_batch())
    assert len(on_a_gpu) == 2  # layers
    torch.testing.assert_close(fused.loss, plain.loss, rtol=1e-5, atol=0)
    assert fused.distance(plain) < 1e-5


def test_torch_takes_the_arguments() -> None:
    """Shapes and arguments alone: its kernel runs on a GPU only, where no test of this project was run yet."""
    query, key, value, edges = (
        torch.empty(shape, dtype=dtype, device="meta")
        for shape, dtype in (
            ((1, 4, sum(LENGTHS), 16), torch.bfloat16),
            ((1, 2, sum(LENGTHS), 16), torch.bfloat16),
            ((1, 2, sum(LENGTHS), 16), torch.bfloat16),
            ((len(LENGTHS) + 1,), torch.int32),
        )
    )
    query.requires_grad_()
    output = segments._all_at_once(query, key, value, segments.Segments(list(LENGTHS), edges), 0.3)
    assert output.shape == (1, sum(LENGTHS), 4, 16)
    (gradient,) = torch.autograd.grad(output.sum(), query)
    assert gradient.shape == query.shape


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, True),
        ({"dtype": torch.float32}, False),
        ({"shape": (1, 4, 40, 100)}, False),
        ({"shape": (1, 4, 40, 256)}, False),
        ({"capability": (7, 5)}, False),
        ({"cuda": None}, False),  # ROCm
        ({"built": False}, False),  # as torch for Windows has been
    ],
)
def test_the_kernel_is_called_where_it_can_be(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], taken: bool
) -> None:
    """Of a card from Ampere on; all of it stood in for."""
    facts: dict[str, Any] = {
        "dtype": torch.bfloat16,
        "shape": (1, 4, 40, 128),
        "capability": (8, 0),
        "cuda": "13.0",
        "built": True,
    }
    facts |= change
    monkeypatch.setattr(torch.version, "cuda", facts["cuda"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: facts["capability"])
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: facts["built"])
    query: Any = SimpleNamespace(is_cuda=True, dtype=facts["dtype"], shape=facts["shape"], device="cuda:0")
    assert takes_varlen(query, dropout=0.0) is taken
    assert not takes_varlen(query, dropout=0.1)
    assert takes_groups(query) is (taken or facts["shape"][-1] == 256)


def test_the_kernel_is_for_gpus_and_known_here() -> None:
    assert segments._varlen_is_known()
    assert not takes_varlen(heads(4, seed=0).to(torch.bfloat16), dropout=0.0)


def test_positions_are_looked_at_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    made = segments.Segments

    def counted(lengths: list[int], edges: torch.Tensor) -> segments.Segments:
        looked.append(len(lengths))
        return made(lengths, edges)

    monkeypatch.setattr(segments, "Segments", counted)
    model = with_lora(base_model(num_hidden_layers=4))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with fast_path(model) as fast:
        assert fast.head is not None
        for _ in range(2):
            one_pass(model, ScoredModel(model, fast.head), packed_batch())
    assert looked == [len(LENGTHS)] * 2
