"""What a finished run leaves: adapter, tokenizer, contract, resolved config, ledger, metrics, card and report."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.adapters import AdapterContract, BaseIdentity, ContinuedFrom, base_fingerprint
from qlora_kit.base_files import BaseRef
from qlora_kit.config import RunConfig
from qlora_kit.data.chat import chat_template_sha256, stop_token_ids, template_system_prompt
from qlora_kit.data.ledger import Ledger
from qlora_kit.report import Sample
from qlora_kit.training.record import write_record
from qlora_kit.training.settings import CONFIG_FILE, RECORDED_LIBRARIES

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Trained:
    """Everything that the files of a finished run are written from.

    Attributes:
        config: The resolved configuration.
        ref: The base.
        model: The PEFT model with the kept adapter in it.
        tokenizer: The base's tokenizer.
        quantization: The contract's quantization facts, measured before training.
        ledger: What happened to each row.
        metrics: Losses and counts of the run.
        history: Log lines of the run, oldest first.
        continued_from: The adapter that the run went on from, or None.
        samples: Answers before and after training.
    """

    config: RunConfig
    ref: BaseRef
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    quantization: dict[str, Any]
    ledger: Ledger
    metrics: dict[str, Any]
    history: tuple[dict[str, Any], ...]
    continued_from: ContinuedFrom | None = None
    samples: tuple[Sample, ...] = ()


def write_run_files(trained: Trained, folder: Path) -> None:
    """Fill ``folder`` with the files of a finished run."""
    adapter = trained.model.peft_config["default"]
    adapter.base_model_name_or_path = trained.ref.id
    adapter.revision = trained.ref.revision
    if isinstance(adapter.target_modules, set):  # a set's order, and with it the file, differs between processes
        adapter.target_modules = sorted(adapter.target_modules)
    trained.model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    trained.tokenizer.save_pretrained(folder)
    (folder / CONFIG_FILE).write_text(trained.config.to_yaml(), encoding="utf-8")
    trained.ledger.write(folder / "ledger.jsonl")
    write_record(
        folder,
        metrics=trained.metrics,
        device=trained.model.device,
        ledger=trained.ledger,
        samples=trained.samples,
        history=trained.history,
    )
    (folder / "README.md").write_text(_card(trained), encoding="utf-8")
    make_contract(trained).save(folder)


def make_contract(trained: Trained) -> AdapterContract:
    """The contract of the trained adapter."""
    config, task = trained.config, trained.config.task_spec()
    return AdapterContract(
        base=BaseIdentity(trained.ref.id, trained.ref.revision, base_fingerprint(trained.ref.path)),
        quantization=trained.quantization,
        chat_template_sha256=chat_template_sha256(trained.tokenizer),
        system_prompt=task.system_prompt or template_system_prompt(trained.tokenizer) or "",
        stop_token_ids=stop_token_ids(trained.tokenizer),
        generation={"max_new_tokens": task.max_new_tokens, "do_sample": False},
        task=config.task,
        metric_names=task.metrics,
        data=trained.ledger.data_files("train", "validation"),
        config_sha256=config.sha256(),
        versions={name: version(name) for name in RECORDED_LIBRARIES},
        metrics=trained.metrics,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        kit_version=version("qlora-kit"),
        name=config.name,
        continued_from=trained.continued_from,
    )


def _card(trained: Trained) -> str:
    config, task, metrics = trained.config, trained.config.task_spec(), trained.metrics
    losses = "\n".join(f"- {name}: {value}" for name, value in metrics.items() if value is not None)
    return f"""---
library_name: peft
base_model: {trained.ref.id}
pipeline_tag: text-generation
tags: [lora, qlora]
---

# {config.name}

A LoRA adapter for `{trained.ref.id}`: {task.description}. Trained by QLoRA Kit {version("qlora-kit")} on
{trained.ledger.rows["train"]:,} rows with {trained.ledger.supervised_tokens["train"]:,} supervised tokens.

- system prompt: {task.system_prompt!r}
- r {config.lora.r}, lora_alpha {config.lora.lora_alpha}, target modules {config.lora.target_modules}
{losses}

`qlora_kit.json` is the contract: what base, quantization, chat template and stop tokens this adapter was trained with.
"""
