"""The fields read from source against the imported SFTConfig."""

from __future__ import annotations

import dataclasses

import pytest

from qlora_kit.config.sft_fields import SftField, sft_fields


def test_names_equal_those_of_the_imported_class() -> None:
    from trl import SFTConfig

    assert set(sft_fields()) == {field.name for field in dataclasses.fields(SFTConfig)}


def test_choices_equal_those_of_the_imported_enums() -> None:
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    assert set(sft_fields()["optim"].choices) == {name.value for name in OptimizerNames}
    assert set(sft_fields()["lr_scheduler_type"].choices) == {name.value for name in SchedulerType}
    assert sft_fields()["eval_strategy"].choices == ("no", "steps", "epoch")


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("weight_decay", [0, 0.1], ["0.1", True, None]),
        ("per_device_eval_batch_size", [4], [4.0, True, "4"]),
        ("tf32", [True, None], [1, "true"]),
        ("report_to", ["none", ["wandb"], None], [1, True]),
        ("lr_scheduler_kwargs", [{"num_cycles": 1}, None, "{}"], [[1], 3]),
        ("parallelism_config", [1, "x", {}], []),
        ("loss_type", ["nll", "dft"], ["nlll", 1]),
    ],
)
def test_values(name: str, good: list[object], bad: list[object]) -> None:
    field = sft_fields()[name]
    assert all(field.accepts(value) for value in good)
    assert not any(field.accepts(value) for value in bad)


def test_expected_in_words() -> None:
    assert SftField("a", frozenset({"int", "null"}), ()).expected == "a whole number or null"
    assert SftField("a", frozenset({"str"}), ("x", "y")).expected == "one of x, y"
