"""Refuses what can be refused before a weight of the base is read: adapter, claims and data in, a plan out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qlora_kit.adapters import (
    AdapterContract,
    AdapterFiles,
    AdapterStore,
    BaseFacts,
    DataFile,
    check_adapter_folder,
    no_base_given,
    pair_faults,
)
from qlora_kit.adapters.card import RUN_CONFIG_FILE
from qlora_kit.adapters.contract_file import ADOPTED, COMBINED, TRAINED
from qlora_kit.adapters.names import NAME_PATTERN
from qlora_kit.base_files import BaseRef, read_model_config, resolve_base, resolve_description
from qlora_kit.base_layout import read_layout
from qlora_kit.config import QuantizationSection, RunConfig, load_config
from qlora_kit.data.chat import control_tokens
from qlora_kit.data.preparing import prepare
from qlora_kit.errors import AdapterError, ConfigError
from qlora_kit.generation import Sampling
from qlora_kit.models import base_facts, load_tokenizer
from qlora_kit.prequantized import agreed_quantization, read_prequantization
from qlora_kit.reference_answers import encode_answers, with_system
from qlora_kit.safetensors_header import shown
from qlora_kit.suggest import nearest
from qlora_kit.tasks import TASKS, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.data.encoding import Encoded

TrainedIn = Literal["4bit", "16bit"]
_WRITERS = {TRAINED: "training", COMBINED: "combination"}


@dataclass(frozen=True)
class Claims:
    """What an adopter knows of an adapter; None where it is not known.

    Attributes:
        base: ``tiny``, a folder, or a Hub id.
        task: One of ``TASKS``, or a name of its own; the adapter's name by default.
        trained_in: Whether the base was loaded in 4 bits while the adapter was trained.
        quant_type: Of a base in 4 bits; ``nf4`` by default.
        double_quant: Whether a base in 4 bits had its constants quantized too; by default it had.
        system_prompt: That the adapter was trained with; an empty text says that there was none.
        max_new_tokens: Longest answer, in tokens; the task's limit by default.
        validation: Files of rows like those of training, which the adapter's loss is measured on.
    """

    base: str | None = None
    task: str | None = None
    trained_in: TrainedIn | None = None
    quant_type: Literal["nf4", "fp4"] | None = None
    double_quant: bool | None = None
    system_prompt: str | None = None
    max_new_tokens: int | None = None
    validation: tuple[str, ...] = ()


@dataclass(frozen=True)
class AdoptionPlan:
    """An adoption that passed every check that needs no weights of the base.

    Attributes:
        claims: What the adopter said.
        files: The checked adapter.
        name: What it will be called in the store.
        task: Its task; no metrics where it is none of ``TASKS``.
        ref: The base.
        facts: What was measured of the base's files.
        tokenizer: The base's.
        candidates: How the base may have been loaded in training: in one way if that is known, else in both.
        rows: The validation rows behind the claimed system prompt.
        bare_rows: The same rows without it; empty where no prompt is claimed.
        data: The files that ``rows`` come from.
        omit: Files of the adapter's folder that are not carried over.
        notes: What the adopter should know, a sentence each.
    """

    claims: Claims
    files: AdapterFiles
    name: str
    task: Task
    ref: BaseRef
    facts: BaseFacts
    tokenizer: PreTrainedTokenizerBase
    candidates: tuple[QuantizationSection, ...]
    rows: tuple[Encoded, ...]
    bare_rows: tuple[Encoded, ...]
    data: tuple[DataFile, ...]
    omit: tuple[str, ...]
    notes: tuple[str, ...]


def plan_adoption(
    adapter: str, store: AdapterStore, claims: Claims, *, name: str | None, replace: bool
) -> AdoptionPlan:
    """Check the adapter, its place in the store, the claims, the base's files and the data.

    Raises:
        AdapterError: The adapter is unsound, has a contract, does not fit the base, or its name is taken; or nothing
            says on which base, or how, it was trained.
        OutputError: The store cannot be written to.
        BaseModelError: The base cannot be found or used.
        ConfigError: A claim is impossible.
        DataError: The validation rows cannot be used.
    """
    folder = store.get(adapter)
    files = check_adapter_folder(folder)
    _refuse_contract(files, replace=replace)
    _check_claims(claims)
    if claims.base is None:
        raise no_base_given(folder, files.config.base_model_name_or_path)
    candidates = _candidates(files, resolve_description(claims.base), claims)
    chosen = store.require_place(folder, name, replace=replace)
    ref = resolve_base(claims.base)
    faults = pair_faults(files, read_layout(ref).linear_shapes)
    if faults:
        raise AdapterError.of(faults)
    tokenizer = load_tokenizer(ref)
    config = _as_config(chosen, claims)
    omit = () if _is_own_config(folder, config.task) else (RUN_CONFIG_FILE,)
    rows, bare_rows, data, notes = _read_rows(config, claims, tokenizer)
    if omit and (folder / RUN_CONFIG_FILE).exists():
        notes.append(f"{folder / RUN_CONFIG_FILE} is no config of the task {config.task}, and is not carried over")
    return AdoptionPlan(
        claims=claims,
        files=files,
        name=chosen,
        task=config.task_spec(),
        ref=ref,
        facts=base_facts(ref, tokenizer),
        tokenizer=tokenizer,
        candidates=candidates,
        rows=rows,
        bare_rows=bare_rows,
        data=data,
        omit=omit,
        notes=(*_claim_notes(files, config, claims), *notes),
    )


def _refuse_contract(files: AdapterFiles, *, replace: bool) -> None:
    if files.contract is None:
        return
    origin = AdapterContract.load(files.contract).origin
    if origin != ADOPTED:
        raise AdapterError(
            f"{files.folder}: the adapter has a contract, which its {_WRITERS[origin]} wrote",
            expected="an adapter without contract",
            fix="use it as it is; `qlora-kit adapters add` publishes it into a store",
        )
    if not replace:
        raise AdapterError(
            f"{files.folder}: the adapter is adopted already",
            expected="an adapter without contract",
            fix="use it as it is, or give --replace to measure it again and replace its contract",
        )


def _check_claims(claims: Claims) -> None:
    if claims.max_new_tokens is not None:
        Sampling(max_new_tokens=claims.max_new_tokens)
    if claims.task is not None and re.fullmatch(NAME_PATTERN, claims.task) is None:
        expected = "1 to 64 letters, digits, - and _, the first a letter or digit"
        fix = f"use one of {', '.join(TASKS)}, or such a name"
        raise ConfigError(f"task {shown(claims.task)} is no name of a task", expected=expected, fix=fix)
    if claims.trained_in == "16bit" and not (claims.quant_type is None and claims.double_quant is None):
        raise ConfigError(
            "trained in 16 bits, and yet a kind of 4-bit quantization is given",
            expected="--quant-type and --double-quant only for an adapter that was trained in 4 bits",
            fix="leave them out, or give --trained-in 4bit",
        )
    if not all(claims.validation):
        raise ConfigError("--validation is empty", expected="the path of a file", fix="name a file, or leave it out")


def _candidates(files: AdapterFiles, described: BaseRef, claims: Claims) -> tuple[QuantizationSection, ...]:
    """How the base may have been loaded in training."""
    in_16_bit = QuantizationSection(load_in_4bit=False)
    where = str(described.path / "config.json")
    stored = read_prequantization(read_model_config(described), where=where)
    if stored is not None:
        if claims.trained_in == "16bit" or claims.quant_type is not None or claims.double_quant is not None:
            raise AdapterError(
                f"{described.id}: the base's own files hold quantized weights and say how; the claims say it again",
                expected="--trained-in 4bit or nothing, and neither --quant-type nor --double-quant",
                fix="leave these options out, or give the base in 16 bits with --base",
            )
        return (agreed_quantization(QuantizationSection(), stored, where=described.id),)
    if claims.trained_in is not None:
        return (_four_bit(claims) if claims.trained_in == "4bit" else in_16_bit,)
    if claims.validation:
        return _four_bit(claims), in_16_bit
    named = files.config.base_model_name_or_path
    hint = "" if named is None or "bnb-4bit" not in named else f" (its configuration names {shown(named)}: 4bit)"
    raise AdapterError(
        f"{files.folder}: nothing says whether the adapter was trained on 4-bit or 16-bit weights: PEFT's files do not",
        expected="--trained-in 4bit (QLoRA) or 16bit (LoRA), or --validation to measure it",
        fix=f"give --trained-in{hint}, or --validation with rows like those it was trained on",
    )


def _four_bit(claims: Claims) -> QuantizationSection:
    """As claimed, else as bitsandbytes is used for QLoRA."""
    settings = {"bnb_4bit_quant_type": claims.quant_type, "bnb_4bit_use_double_quant": claims.double_quant}
    return QuantizationSection.model_validate({name: value for name, value in settings.items() if value is not None})


def _as_config(name: str, claims: Claims) -> RunConfig:
    """The config by which the validation rows are read: the task's own, but for the system prompt."""
    return RunConfig.model_validate(
        {
            "name": name,
            "task": name if claims.task is None else claims.task,
            "data": {"train": ["-"], "validation": list(claims.validation), "system_prompt": ""},
            "eval": {} if claims.max_new_tokens is None else {"max_new_tokens": claims.max_new_tokens},
        }
    )


def _is_own_config(folder: Path, task: str) -> bool:
    """Whether the folder's ``config.yaml`` is one that ``qlora-kit eval`` can score the adapter by."""
    path = folder / RUN_CONFIG_FILE
    if not path.is_file():
        return False
    try:
        return load_config(path).task == task
    except ConfigError:
        return False


def _read_rows(
    config: RunConfig, claims: Claims, tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[Encoded, ...], tuple[Encoded, ...], tuple[DataFile, ...], list[str]]:
    """The rows behind the claimed system prompt, the rows without it, their files, and what was left out."""
    if not claims.validation:
        return (), (), (), []
    only = config.data.model_copy(update={"train": ()})
    prepared = prepare(config.model_copy(update={"data": only}), control_tokens=control_tokens(tokenizer))
    examples = prepared.validation
    bare = [example.messages for example in examples]
    prompt = claims.system_prompt or ""
    rows = encode_answers(examples, [with_system(messages, prompt) for messages in bare], tokenizer)
    data = prepared.ledger.data_files("validation")
    report = prepared.report
    notes = []
    if report.kept < report.rows:
        notes.append(f"{report.kept} of {report.rows} validation rows are measured; {report.duplicates} are doubled")
    return tuple(rows), tuple(encode_answers(examples, bare, tokenizer)) if prompt else (), data, notes


def _claim_notes(files: AdapterFiles, config: RunConfig, claims: Claims) -> list[str]:
    notes = []
    named = files.config.base_model_name_or_path
    if named is not None and named != claims.base:
        notes.append(f"the adapter's configuration names the base {shown(named)}; it is measured on {claims.base}")
    if config.task not in TASKS and (match := nearest(config.task, TASKS)) is not None:
        notes.append(f"the task {config.task} is none of the kit's; did you mean {match}?")
    if claims.system_prompt is None:
        own = TASKS[config.task].system_prompt if config.task in TASKS else ""
        hint = f" (the kit's own for this task is {own!r})" if own else ""
        notes.append(f"no system prompt is assumed; give --system-prompt if it was trained with one{hint}")
    return notes
