"""The bank gives each row of a mixed batch what PEFT gives it alone, for every kind of LoRA pair, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from random_adapters import copy_of, with_adapter, write_adapter
from transformers import PreTrainedModel

from qlora_kit.adapters import read_adapter
from qlora_kit.errors import AdapterError, BaseModelError
from qlora_kit.lora_bank import LoraBank, LoraFactors, can_be_banked, read_factors, weighted_sum

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "few": {"r": 2, "target_modules": ["q_proj", "down_proj"]},
    "rslora": {"use_rslora": True, "r": 3, "lora_alpha": 5},
    "patterns": {"rank_pattern": {"q_proj": 8, "layers.1.mlp.up_proj": 1}, "alpha_pattern": {"v_proj": 3}},
    "values only": {"r": 6, "target_modules": ["v_proj"]},
    "one layer": {"r": 5, "layers_to_transform": [1], "target_modules": ["o_proj", "gate_proj"]},
}
IDS = torch.arange(40, 100).reshape(6, 10)


@pytest.fixture(scope="module")
def folders(random_model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter of each kind."""
    root = tmp_path_factory.mktemp("kinds")
    return {
        kind: write_adapter(root / str(seed), random_model, seed=seed, **settings)
        for seed, (kind, settings) in enumerate(KINDS.items())
    }


def factors_of(folder: Path) -> LoraFactors:
    return read_factors(read_adapter(lambda: folder, lambda files, contract: None))


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.fixture
def model(random_model: PreTrainedModel) -> PreTrainedModel:
    return copy_of(random_model)


@pytest.fixture(scope="module")
def expected(random_model: PreTrainedModel, folders: dict[str, Path]) -> dict[str, torch.Tensor]:
    """PEFT's logits of each adapter alone; those of the base too."""
    found = {kind: logits(with_adapter(random_model, folder)) for kind, folder in folders.items()}
    return found | {"base": logits(with_adapter(random_model, None))}


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Logits of a base this rough: PEFT's own are up to 4.5e-5 from those in fp64."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=5e-6 * float(wanted.abs().max()))


def filled(model: PreTrainedModel, folders: dict[str, Path]) -> tuple[LoraBank, dict[str, int]]:
    bank = LoraBank(model, slots=len(folders))
    slots = {kind: number for number, kind in enumerate(folders, start=1)}
    for kind, slot in slots.items():
        bank.write(slot, factors_of(folders[kind]))
    return bank, slots | {"base": 0}


def test_each_row_of_a_mixed_batch_is_pefts_own(
    model: PreTrainedModel, folders: dict[str, Path], expected: dict[str, torch.Tensor]
) -> None:
    bank, slots = filled(model, folders)
    kinds = list(slots)
    for shift in range(len(kinds)):
        chosen = [kinds[(row + shift) % len(kinds)] for row in range(len(IDS))]
        for keep in (False, True, True):
            bank.choose([slots[kind] for kind in chosen], keep=keep)
            found = logits(model)
            for row, kind in enumerate(chosen):
                close(found[row], expected[kind][row])
    close_to = [float((expected[kind] - expected["base"]).abs().max()) for kind in folders]
    assert min(close_to) > 0.1  # each adapter does something


def test_each_layer_gives_pefts_output_within_1e_5(
    model: PreTrainedModel, random_model: PreTrainedModel, folders: dict[str, Path]
) -> None:
    bank, slots = filled(model, folders)
    generator = torch.Generator().manual_seed(0)
    for kind, folder in folders.items():
        peft = with_adapter(random_model, folder).get_base_model()
        bank.choose([slots[kind], 0, slots["plain"]])
        for layer, theirs in zip(model.model.layers, peft.model.layers, strict=True):
            for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
                x = torch.randn(3, 4, 64, generator=generator)
                found, wanted = layer.get_submodule(part)(x)[0], theirs.get_submodule(part)(x)[0]
                torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
            for part, width in (("mlp.gate_proj", 64), ("mlp.up_proj", 64), ("mlp.down_proj", 128)):
                x = torch.randn(3, 4, width, generator=generator)
                found, wanted = layer.get_submodule(part)(x)[0], theirs.get_submodule(part)(x)[0]
                torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_one_adapter_for_all_rows_and_none(
    model: PreTrainedModel, folders: dict[str, Path], expected: dict[str, torch.Tensor]
) -> None:
    bank, slots = filled(model, folders)
    for kind, slot in slots.items():
        for rows in (slot, [slot] * len(IDS)):
            bank.choose(rows)
            close(logits(model), expected[kind])
    bank.choose(None)
    assert torch.equal(logits(model), expected["base"])


@pytest.mark.gpu
def test_each_row_is_pefts_own_on_a_gpu(
    model: PreTrainedModel, folders: dict[str, Path], expected: dict[str, torch.Tensor]
) -> None:
    bank, slots = filled(model.cuda(), folders)
    kinds = list(slots)[: len(IDS)]
    bank.choose([slots[kind] for kind in kinds])
    found = logits(model, IDS.cuda()).cpu()
    for row, kind in enumerate(kinds):
        torch.testing.assert_close(found[row], expected[kind][row], rtol=1e-3, atol=1e-3)


def test_rows_of_the_base_are_untouched_to_the_bit_in_a_mixed_batch(
    model: PreTrainedModel, folders: dict[str, Path]
) -> None:
    bank, slots = filled(model, folders)
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(3, 2, layer.in_features, generator=torch.Generator().manual_seed(0))
    plain = layer(x)
    bank.choose([slots["plain"], 0, slots["few"]])
    mixed = layer(x)
    assert torch.equal(mixed[1], plain[1])
    assert not torch.allclose(mixed[0], plain[0])


def test_a_slot_is_written_over_without_residue(
    model: PreTrainedModel, folders: dict[str, Path], expected: dict[str, torch.Tensor]
) -> None:
    bank = LoraBank(model, slots=2)
    for kind in ("patterns", "few", "plain", "values only", "rslora"):  # ranks and layers come and go
        bank.write(2, factors_of(folders[kind]))
        bank.choose([2, 0, 2, 2, 2, 2], keep=True)
        found = logits(model)
        close(found[0], expected[kind][0])
        close(found[1], expected["base"][1])


def test_a_weighted_sum_is_the_sum_of_the_changes(
    model: PreTrainedModel, random_model: PreTrainedModel, folders: dict[str, Path]
) -> None:
    """PEFT merges one adapter after the other, scaled, into the weights of a copy."""
    parts = {"plain": 0.7, "patterns": -0.3, "few": 1.0}
    merged = copy_of(random_model)
    weights = dict(merged.named_parameters())
    for kind, weight in parts.items():
        for name, layer in with_adapter(random_model, folders[kind]).named_modules():
            if hasattr(layer, "get_delta_weight"):
                target = weights[f"{name.removeprefix('base_model.model.')}.weight"]
                target.data += weight * layer.get_delta_weight("default")
    bank = LoraBank(model, slots=1)
    bank.write(1, weighted_sum([(factors_of(folders[kind]), weight) for kind, weight in parts.items()]))
    bank.choose(1)
    wanted = logits(merged)
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=3e-6 * float(wanted.abs().max()))


def test_parameters_keep_names_types_and_storage(random_model: PreTrainedModel) -> None:
    model = copy_of(random_model)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    state = list(model.state_dict())
    LoraBank(model, slots=2)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
    assert list(model.state_dict()) == state
    assert all(isinstance(layer.self_attn.q_proj, torch.nn.Linear) for layer in model.model.layers)
    assert not any(isinstance(module, Linear4bit) for module in model.modules())


def test_what_is_more_than_pairs_is_told_apart(random_model: PreTrainedModel, tmp_path: Path) -> None:
    for name, settings, fits in (
        ("plain", {}, True),
        ("dora", {"use_dora": True}, False),
        ("saved", {"modules_to_save": ["lm_head"]}, False),
        ("tokens", {"trainable_token_indices": {"embed_tokens": [5, 6]}}, False),
    ):
        folder = write_adapter(tmp_path / name, random_model, **settings)
        found = []
        read_adapter(lambda: folder, lambda files, contract: found.append(can_be_banked(files)))  # noqa: B023
        assert found == [fits], name


def test_factors_of_another_base_and_slots_that_are_not_there_are_refused(model: PreTrainedModel) -> None:
    bank = LoraBank(model, slots=1)
    name = "model.layers.0.mlp.up_proj"
    for module, shape in ((name, (64, 64)), ("model.layers.7.mlp.up_proj", (64, 128))):
        pairs = {module: (torch.zeros(2, shape[0]), torch.zeros(2, shape[1]))}
        with pytest.raises(AdapterError, match=r"is adapted as"):
            bank.write(1, LoraFactors(pairs))
    for slot in (0, 2):
        with pytest.raises(ValueError, match="is not one of"):
            bank.write(slot, LoraFactors({name: (torch.zeros(2, 64), torch.zeros(2, 128))}))


def test_a_batch_of_other_rows_than_chosen_is_refused(model: PreTrainedModel, folders: dict[str, Path]) -> None:
    bank, slots = filled(model, folders)
    bank.choose([slots["plain"], 0])
    with pytest.raises(BaseModelError, match="in a batch of 2 rows"):
        logits(model)


def test_memory_is_taken_when_adapters_come(model: PreTrainedModel, folders: dict[str, Path]) -> None:
    bank = LoraBank(model, slots=64)
    assert bank.bytes == 0
    factors = factors_of(folders["plain"])
    bank.write(1, factors)
    assert bank.bytes == 2 * factors.bytes  # and the zeros of the base's slot
