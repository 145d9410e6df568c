"""The adapter that a run begins with: a new one, one initialised from data or weights, or an earlier one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.base_files import BaseRef, read_model_config
from qlora_kit.config import RunConfig
from qlora_kit.errors import ConfigError
from qlora_kit.models import attach_lora
from qlora_kit.training.continuing import EarlierAdapter, attach_earlier, require_fitting_base
from qlora_kit.training.initialising import initialise_with_eva, initialise_with_loftq

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class AdapterStart:
    """What the first adapter weights are made from.

    Attributes:
        earlier: The adapter to go on from; None for a new one.
        rows: Training rows, for EVA.
        pad_token_id: For batches of rows.
        checkpoint: Where the run is resumed; the trainer reads the weights themselves from it.
        token_rows: Of a new adapter: module name to the token ids whose rows are trained too.
    """

    earlier: EarlierAdapter | None
    rows: Dataset | None
    pad_token_id: int
    checkpoint: Path | None
    token_rows: Mapping[str, Sequence[int]] | None = None


def require_fitting_start(
    config: RunConfig, ref: BaseRef, tokenizer: PreTrainedTokenizerBase, earlier: EarlierAdapter | None
) -> None:
    """Check, before the base is loaded, that the adapter can begin on it as the configuration says.

    Raises:
        AdapterError: The earlier adapter's contract does not match the base.
        ConfigError: LoftQ is asked for, and the base's files hold quantized weights: it needs those they were made of.
    """
    if earlier is not None:
        require_fitting_base(earlier, ref, tokenizer, config.quantization)
    if config.lora.init_lora_weights == "loftq" and "quantization_config" in read_model_config(ref):
        raise ConfigError(
            f"lora.init_lora_weights: loftq needs the 16-bit weights, and the files of {ref.id} are quantized",
            expected="a base with 16-bit weights, quantized while loading",
            fix="set model.base to the 16-bit base, or use another initialisation",
        )


def attach_adapter(
    base: PreTrainedModel, config: RunConfig, start: AdapterStart, *, ref: BaseRef, quantization: Mapping[str, Any]
) -> PeftModel:
    """The base with the adapter that the run begins with, as ``default``.

    Args:
        base: The loaded base; it is not changed.
        config: Says the adapter's settings and its initialisation.
        start: What the weights are made from.
        ref: Where the base's files are.
        quantization: What was measured of the loaded base.

    Raises:
        BaseModelError, ConfigError, AdapterError: The adapter does not go with the base or the data.
    """
    from peft import PeftModel

    kind = config.lora.init_lora_weights
    if start.earlier is not None:
        return attach_earlier(start.earlier, base, quantization=quantization, lora_dropout=config.lora.lora_dropout)
    if kind == "eva" and start.checkpoint is not None:  # the ranks are the checkpoint's
        return PeftModel.from_pretrained(base, start.checkpoint, is_trainable=True)
    model = attach_lora(base, config.lora, start.token_rows)
    if start.checkpoint is None and kind == "eva" and start.rows is not None:
        initialise_with_eva(model, start.rows, pad_token_id=start.pad_token_id, seed=config.train.seed)
    if start.checkpoint is None and kind == "loftq":
        initialise_with_loftq(model, ref.path)
    return model
