"""Going on from an existing adapter on new data: the adapter is checked, and its own LoRA settings are taken over."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.adapter_loading import base_modules, require_fit
from qlora_kit.adapters import (
    AdapterContract,
    AdapterFiles,
    AdapterStore,
    BaseFacts,
    ContinuedFrom,
    check_adapter_folder,
    require_shareable,
    weights_sha256,
)
from qlora_kit.adapters.lora_settings import LoraSettings
from qlora_kit.adapters.store import DEFAULT_STORE
from qlora_kit.architecture import FAMILIES, read_architecture
from qlora_kit.base_files import BaseRef, read_model_config
from qlora_kit.config import LoraSection, QuantizationSection, RunConfig
from qlora_kit.errors import AdapterError, ConfigError, Fault
from qlora_kit.models import base_facts, quantization_facts

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EarlierAdapter:
    """An adapter that passed the gate, to go on from.

    Attributes:
        files: Its folder, settings and tensors.
        contract: None for one trained elsewhere.
        origin: What the new contract says of it.
    """

    files: AdapterFiles
    contract: AdapterContract | None
    origin: ContinuedFrom


def with_earlier_adapter(config: RunConfig, ref: BaseRef) -> tuple[RunConfig, EarlierAdapter | None]:
    """The configuration with the settings of the adapter to go on from, and that adapter; as it is without one.

    Args:
        config: ``model.adapter`` names the adapter.
        ref: The base; its configuration alone is read.

    Raises:
        AdapterError, ConfigError: As ``earlier_adapter`` and ``with_settings_of``.
    """
    earlier = earlier_adapter(config)
    return (config, None) if earlier is None else (with_settings_of(earlier, config, ref), earlier)


def earlier_adapter(config: RunConfig) -> EarlierAdapter | None:
    """The adapter that ``model.adapter`` names; None where it names none.

    Raises:
        AdapterError: It is not there, unsound, or brings tensors of the base.
        ConfigError: It lies in the folder that this run writes.
    """
    if config.model.adapter is None:
        return None
    folder = AdapterStore(DEFAULT_STORE).get(config.model.adapter).resolve()
    output = Path(config.output_dir).resolve()
    if output == folder or output in folder.parents:
        raise ConfigError(
            f"model.adapter: {config.model.adapter} lies in output_dir, {config.output_dir}, which this run writes",
            expected="an adapter outside of the run folder",
            fix="set another output_dir; to go on with the same data, leave model.adapter out and use --resume",
        )
    files = check_adapter_folder(folder)
    require_shareable(files)
    if files.config.bias != "none":
        raise AdapterError(
            f"{folder}: bias is {files.config.bias!r}, which the kit does not train",
            expected="bias 'none'",
            fix="go on from an adapter without biases",
        )
    contract = AdapterContract.load(folder) if files.contract is not None else None
    if contract is None:
        logger.warning(
            "%s has no contract: base, chat template and stop tokens of its training cannot be checked; "
            "`qlora-kit adapters adopt` writes one from what can be measured",
            folder,
        )
    name = folder.name if contract is None or contract.name is None else contract.name
    return EarlierAdapter(files, contract, ContinuedFrom(name, weights_sha256(folder)))


def with_settings_of(earlier: EarlierAdapter, config: RunConfig, ref: BaseRef) -> RunConfig:
    """The configuration with the adapter's own ``lora`` section; keys that the user did not give are taken over.

    Raises:
        ConfigError: With every ``lora`` key that was given and differs.
    """
    own = _lora_section(earlier.files.config)
    given = {key: _plain(value) for key, value in config.lora if key in config.lora.model_fields_set & own.keys()}
    if given.get("target_modules") == "all-linear" and _adapts_all_linear(earlier.files, ref):
        del given["target_modules"]
    faults = [
        Fault(
            f"lora.{key}: is {value!r}, and the adapter of model.adapter {_has(key, own[key])}",
            "the adapter's own settings: its weights have no other meaning",
            f"remove lora.{key}, or train a new adapter without model.adapter",
        )
        for key, value in given.items()
        if value != _plain(own[key])
    ]
    if faults:
        raise ConfigError.of(faults)
    return config.model_copy(update={"lora": config.lora.model_copy(update=own)})


def _lora_section(settings: LoraSettings) -> dict[str, Any]:
    """The keys of ``LoraSection`` that an adapter settles; the dropout is left to the new run."""
    values = {
        "r": settings.r,
        "lora_alpha": settings.lora_alpha,
        "target_modules": settings.target_modules,
        "exclude_modules": settings.exclude_modules or None,
        "use_rslora": settings.use_rslora,
        "use_dora": settings.use_dora,
        "init_lora_weights": True,
        "modules_to_save": settings.modules_to_save,
        "rank_pattern": dict(settings.rank_pattern),
        "alpha_pattern": dict(settings.alpha_pattern),
    }
    return {key: values[key] for key in LoraSection.model_fields if key in values}


def _has(key: str, value: Any) -> str:
    return "brings its own weights" if key == "init_lora_weights" else f"has {value!r}"


def _plain(value: Any) -> Any:
    """Names in any order and form are the same names."""
    return sorted(value) if isinstance(value, (tuple, list)) else value


def _adapts_all_linear(files: AdapterFiles, ref: BaseRef) -> bool:
    model_config = read_model_config(ref)
    if model_config.get("model_type") not in FAMILIES:
        return False
    targets = read_architecture(model_config, where=str(ref.path / "config.json")).lora_targets()
    return {module.rpartition(".")[2] for module in files.pairs} == set(targets)


def require_fitting_base(
    earlier: EarlierAdapter, ref: BaseRef, tokenizer: PreTrainedTokenizerBase, quantization: QuantizationSection
) -> None:
    """Compare the adapter's contract with the base, before that is loaded.

    Raises:
        AdapterError: With every mismatch.
    """
    if earlier.contract is not None:
        earlier.contract.require_match(base_facts(ref, tokenizer, quantization_facts(quantization)))


def attach_earlier(
    earlier: EarlierAdapter, base: PreTrainedModel, *, quantization: Mapping[str, Any], lora_dropout: float
) -> PeftModel:
    """The base with the adapter on it, trainable, as ``default``.

    Args:
        earlier: The adapter.
        base: The loaded base.
        quantization: What was measured of it, as in ``AdapterContract.quantization``.
        lora_dropout: Of the new run.

    Raises:
        AdapterError: The adapter does not fit the base, or the base's 4-bit codes are not those of its training.
    """
    from peft import LoraConfig, PeftModel

    require_fit(earlier.files, base_modules(base))
    if earlier.contract is not None:
        earlier.contract.require_match(BaseFacts(earlier.contract.base.id, quantization=quantization))
    settings = LoraConfig.from_pretrained(earlier.files.folder)
    settings.lora_dropout = lora_dropout
    settings.inference_mode = False
    settings.task_type = "CAUSAL_LM"
    settings.init_lora_weights = True  # of no effect on weights that are read from the file
    return PeftModel.from_pretrained(base, earlier.files.folder, config=settings, is_trainable=True)
