"""Refuses, before anything costly, an adapter that the config's ``target`` could not serve on the base at hand."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_kit.adapters.module_pattern import module_matcher, names_module
from qlora_kit.architecture import HEAD
from qlora_kit.base_files import BaseRef, read_model_config
from qlora_kit.config import RunConfig
from qlora_kit.config.serving_targets import base_problems, serving_problems
from qlora_kit.errors import ConfigError, Fault


def require_servable(config: RunConfig, ref: BaseRef, token_rows: Sequence[str] = ()) -> None:
    """Compare the LoRA that will be trained with the limits of ``config.target``.

    Args:
        config: As it will be trained: an adapter that training goes on from has brought its own LoRA settings.
        ref: The base.
        token_rows: Modules of which rows are trained beside the adapter, once that is known.

    Raises:
        ConfigError: With everything that the targets cannot serve.
    """
    if not config.target:
        return
    adapts_head = names_module(module_matcher(config.lora.target_modules), HEAD)
    family = str(read_model_config(ref).get("model_type"))
    problems = [
        *serving_problems(config.lora, config.target),
        *base_problems(family, config.target, adapts_head=adapts_head, token_rows=token_rows),
    ]
    if problems:
        raise ConfigError.of(
            [Fault(f"{'.'.join(entry.path)} {entry.what}", entry.expected, entry.fix) for entry in problems]
        )
