"""The contract of an adapter, ``qlora_kit.json``: what it was trained on, and what another base would do to it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qlora_kit.adapters.contract_file import (
    CONTRACT_FILE,
    FORMAT_VERSION,
    NF4_CODES,
    TRAINED,
    read_contract_json,
    write_contract_json,
)
from qlora_kit.errors import AdapterError, Fault

_FILES = {True: "files of 4-bit weights (prequantized)", False: "files of unquantized weights"}
_QUANTIZATION_KEYS = ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")


@dataclass(frozen=True)
class BaseIdentity:
    """The base model that an adapter was trained on: its id or folder, its hub revision, its ``base_fingerprint``."""

    id: str
    revision: str | None
    fingerprint: str


@dataclass(frozen=True)
class DataFile:
    """One data file that an adapter was trained or validated on.

    Attributes:
        split: ``train``, ``validation`` or ``test``.
        name: The file's name, without its folder.
        sha256: Of its bytes.
        rows: How many rows it holds.
    """

    split: str
    name: str
    sha256: str
    rows: int


def library_versions() -> dict[str, str]:
    """Of the libraries that adapters are loaded with."""
    return {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}


@dataclass(frozen=True)
class ContinuedFrom:
    """The adapter that training went on from: its name, and the SHA-256 of its weights' file."""

    name: str
    sha256: str


@dataclass(frozen=True)
class CombinedPart:
    """One adapter of a combination: its name, the SHA-256 of its weights' file, and its weight."""

    name: str
    sha256: str
    weight: float


@dataclass(frozen=True)
class CombinedFrom:
    """How an adapter was combined from others.

    Attributes:
        method: PEFT's ``combination_type``.
        parts: What it was made of.
        density: Share of the values that ``ties`` and ``dare_ties`` keep; None for the others.
        seed: Of the values that ``dare_ties`` drops; None for the others.
    """

    method: str
    parts: tuple[CombinedPart, ...]
    density: float | None = None
    seed: int | None = None


@dataclass(frozen=True)
class BaseFacts:
    """What was measured of the base at hand; None (and a key left out) means not measured, and is not compared.

    Attributes:
        id: Its id or folder.
        revision: Its hub revision.
        fingerprint: Its ``base_fingerprint``.
        chat_template_sha256: Of what its chat template renders for the probe conversations.
        stop_token_ids: The tokens that end an answer.
        quantization: As in ``AdapterContract.quantization``.
    """

    id: str
    revision: str | None = None
    fingerprint: str | None = None
    chat_template_sha256: str | None = None
    stop_token_ids: tuple[int, ...] | None = None
    quantization: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class AdapterContract:
    """Everything that must hold for an adapter to do what it was trained to do.

    Attributes:
        base: The base model.
        quantization: ``load_in_4bit``, ``bnb_4bit_quant_type``, ``bnb_4bit_use_double_quant`` and, optionally,
            ``nf4_codes``: tensor name to a hex sample of its 4-bit codes; ``bnb_4bit_compute_dtype``, recorded and not
            compared; ``prequantized``: the base's own files hold 4-bit weights.
        chat_template_sha256: Of what the chat template renders for probe conversations; None without template.
        system_prompt: Trained with it, be it the chat template's own; a request's own wins.
        stop_token_ids: The tokens that end an answer.
        generation: Generation defaults by their ``GenerationConfig`` names (``max_new_tokens``, ...).
        task: Its task's name.
        metric_names: The task's metrics.
        data: The files it was trained on; of an adopted adapter, those that its loss was measured on.
        config_sha256: Of the resolved run configuration; None for an adopted adapter.
        versions: Library name to version; of an adopted adapter, of the libraries that measured it, and the PEFT that
            wrote it as ``peft_of_training``.
        metrics: What it scored; of an adopted adapter, what was measured.
        created: When, as ISO 8601.
        kit_version: Of qlora_kit.
        name: Its name in a store, if it has one.
        origin: ``trained`` by this kit; ``adopted``: trained elsewhere, the contract written afterwards; or
            ``combined`` from others.
        not_measured: Keys of an adopted contract (``quantization.bnb_4bit_quant_type`` for one key inside another) that
            are its adopter's word, taken by default, or not known at all.
        continued_from: The adapter whose weights training began with; None for a new adapter.
        combined_from: The adapters that it was combined from; None for any other origin.
    """

    base: BaseIdentity
    quantization: Mapping[str, Any]
    chat_template_sha256: str | None
    system_prompt: str | None
    stop_token_ids: tuple[int, ...]
    generation: Mapping[str, Any]
    task: str
    metric_names: tuple[str, ...]
    data: tuple[DataFile, ...]
    config_sha256: str | None
    versions: Mapping[str, str]
    created: str
    kit_version: str
    metrics: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None
    origin: str = TRAINED
    not_measured: tuple[str, ...] = ()
    continued_from: ContinuedFrom | None = None
    combined_from: CombinedFrom | None = None

    @classmethod
    def load(cls, path: Path) -> AdapterContract:
        """Read the contract ``path``, or the one in the adapter folder ``path``. Keys it does not know are left alone.

        Raises:
            AdapterError: No file, no sound JSON, a newer format, or keys that are missing or of another type.
        """
        content = read_contract_json(path / CONTRACT_FILE if path.is_dir() else path)
        values = {item.name: content[item.name] for item in fields(cls) if item.name in content}
        values["base"] = BaseIdentity(**{item.name: content["base"][item.name] for item in fields(BaseIdentity)})
        values["data"] = tuple(
            DataFile(**{item.name: row[item.name] for item in fields(DataFile)}) for row in content["data"]
        )
        values["stop_token_ids"] = tuple(content["stop_token_ids"])
        for key in ("metric_names", "not_measured"):
            values[key] = tuple(content[key])
        earlier = content.get("continued_from")
        if earlier is not None:
            values["continued_from"] = ContinuedFrom(
                **{item.name: earlier[item.name] for item in fields(ContinuedFrom)}
            )
        combined = content.get("combined_from")
        if combined is not None:
            parts = tuple(
                CombinedPart(**{item.name: part[item.name] for item in fields(CombinedPart)})
                for part in combined["parts"]
            )
            density, seed = combined.get("density"), combined.get("seed")
            values["combined_from"] = CombinedFrom(combined["method"], parts, density, seed)
        return cls(**values)

    def save(self, path: Path) -> Path:
        """Write the contract to ``path``, or into the adapter folder ``path``, atomically; returns the file's path.

        Raises:
            AdapterError: A value is not finite or has no place in JSON.
            OutputError: The file cannot be written.
        """
        path = path / CONTRACT_FILE if path.is_dir() else path
        write_contract_json(path, {"format_version": FORMAT_VERSION, **asdict(self)})
        return path

    def mismatches(self, base: BaseFacts) -> list[Fault]:
        """What of ``base`` is not as it was in training, with its effect and the way on.

        Equal weights excuse another id or revision: a model may lie in more than one place.
        """
        return [
            *self._weight_faults(base),
            *self._quantization_faults(base.quantization),
            *self._conversation_faults(base),
        ]

    def require_match(self, base: BaseFacts) -> None:
        """Refuse a base that would not give the trained behaviour.

        Raises:
            AdapterError: With every mismatch.
        """
        faults = self.mismatches(base)
        if faults:
            raise AdapterError.of(faults)

    def system_prompt_fault(self, requested: str | None) -> Fault | None:
        """What a request's own system prompt changes; None where it is the trained one.

        A request's own wins, so that this is something to tell and no reason to refuse.
        """
        if (requested or None) == (self.system_prompt or None):
            return None
        what = (
            f"system prompt: {requested!r}; the adapter was trained with {self.system_prompt!r}, and sees a prompt "
            "of a form it never saw: answers may get worse"
        )
        return Fault(what, f"the system prompt of training, {self.system_prompt!r}", "leave the system prompt out")

    def _weight_faults(self, base: BaseFacts) -> list[Fault]:
        comparable = base.fingerprint is not None and _kind(base.fingerprint) == _kind(self.base.fingerprint)
        if comparable and base.fingerprint == self.base.fingerprint:
            return []
        own = f"--base {self.base.id}"
        if self.base.revision is not None:
            own = f"without --base, the contract's {self.base.id} at revision {self.base.revision} is taken"
        fix = f"load the adapter on its own base: {own}; or train an adapter for this base"
        effect = "the adapter corrects weights that are not these: answers become wrong without any error"
        faults = []
        if base.id != self.base.id:
            what = f"base: the adapter was trained on {self.base.id}, not on {base.id}; {effect}"
            faults.append(Fault(what, f"the base {self.base.id}", fix))
        if None not in (base.revision, self.base.revision) and base.revision != self.base.revision:
            what = f"base revision: trained on {self.base.revision}, at hand is {base.revision}; {effect}"
            faults.append(Fault(what, f"revision {self.base.revision}", fix))
        if comparable:
            what = f"base weights: the fingerprint at hand is {base.fingerprint}; {effect}"
            faults.append(Fault(what, f"the fingerprint {self.base.fingerprint}", fix))
        return faults

    def _quantization_faults(self, at_hand: Mapping[str, Any] | None) -> list[Fault]:
        if at_hand is None:
            return []
        effect = "the adapter learned to correct another rounding of the weights: answers drift from what was evaluated"
        four_bit = self.quantization.get("load_in_4bit") and at_hand.get("load_in_4bit", True)
        faults = self._prequantized_faults(at_hand.get("prequantized"))
        for key in _QUANTIZATION_KEYS if four_bit else _QUANTIZATION_KEYS[:1]:
            if key in self.quantization and key in at_hand and self.quantization[key] != at_hand[key]:
                trained = f"{key}: {json.dumps(self.quantization[key])}"
                what = f"quantization: trained with {trained}, at hand is {json.dumps(at_hand[key])}; {effect}"
                faults.append(Fault(what, trained, f"load the base with quantization.{trained}"))
        trained_codes, codes = self.quantization.get(NF4_CODES) or {}, at_hand.get(NF4_CODES) or {}
        different = sorted(name for name in trained_codes.keys() & codes.keys() if trained_codes[name] != codes[name])
        if different:
            count = f"{len(different)} of {len(trained_codes)}"
            what = f"NF4 codes: {count} sampled tensors differ, the first is {different[0]!r}; {effect}"
            fix = (
                "use the library versions of the contract to quantize, or load the base that was quantized for training"
            )
            faults.append(Fault(what, "the 4-bit codes of training", fix))
        return faults

    def _prequantized_faults(self, at_hand: bool | None) -> list[Fault]:
        """A base of 4-bit files and the model it was quantized from are two bases, with two fingerprints: say so."""
        trained = self.quantization.get("prequantized")
        if trained is None or at_hand is None or trained == at_hand:
            return []
        held, found = _FILES[trained], _FILES[at_hand]
        fix = f"load the adapter on the base it was trained on, {self.base.id}, or train an adapter for this one"
        return [Fault(f"base files: trained on {held}, at hand are {found}", held, fix)]

    def _conversation_faults(self, base: BaseFacts) -> list[Fault]:
        faults = []
        template = base.chat_template_sha256
        if template is not None and template != self.chat_template_sha256:
            what = (
                f"chat template: the base renders conversations otherwise (hash {template}) than in training; "
                "the adapter sees prompts of a form it never saw, and answers get worse"
            )
            fix = "restore the base's own tokenizer files and chat template, or train the adapter again on this base"
            faults.append(Fault(what, f"the template hash {self.chat_template_sha256}", fix))
        if base.stop_token_ids is not None and set(base.stop_token_ids) != set(self.stop_token_ids):
            trained = sorted(set(self.stop_token_ids))
            what = (
                f"stop tokens: trained to end with {trained}, the base stops at {sorted(set(base.stop_token_ids))}; "
                "answers run on past their end, or end too early"
            )
            fix = "restore the base's own tokenizer files and chat template, which say where an answer ends"
            faults.append(Fault(what, f"stop token ids {trained}", f"{fix}, or train the adapter again on this base"))
        return faults


def _kind(fingerprint: str) -> str:
    return fingerprint.partition(":")[0]
