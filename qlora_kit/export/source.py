"""What is exported: a store name, a folder or a base's name in; an adapter, a merged folder or a base out.

A format that takes whole models gets a 16-bit checkpoint: the merged folder or the base itself, or an adapter merged
on the way, beside the output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qlora_kit.adapters import CONTRACT_FILE, AdapterContract, AdapterStore
from qlora_kit.adapters.gate import CONFIG_FILE
from qlora_kit.adapters.trained_base import MAX_REPORT_BYTES
from qlora_kit.adapters.trained_base import REPORT_FILE as MERGE_REPORT_FILE
from qlora_kit.base_files import HUB_ID, TINY, BaseRef, read_model_config, resolve_base, resolve_description
from qlora_kit.errors import AdapterError, BaseModelError, QloraKitError
from qlora_kit.export.results import REPORT_FILE as EXPORT_REPORT_FILE
from qlora_kit.merging import MergeResult, merge_adapter
from qlora_kit.merging.onto import Onto
from qlora_kit.prequantized import read_prequantization
from qlora_kit.strict_json import read_json_object

Kind = Literal["adapter", "merged", "base"]
Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""

_MERGED = "merged"
_KINDS_OF_SOURCES = f"an adapter ({CONFIG_FILE}), a folder that `merge` wrote ({MERGE_REPORT_FILE}), or a base"


@dataclass(frozen=True)
class AnswerDefaults:
    """How a model was trained to be asked and to answer.

    Attributes:
        task: Its task; None where nothing says.
        system_prompt: Trained with it; None where nothing says, or for none.
        stop_token_ids: The tokens that end an answer; empty where nothing says.
        generation: Generation defaults by their ``GenerationConfig`` names.
    """

    task: str | None = None
    system_prompt: str | None = None
    stop_token_ids: tuple[int, ...] = ()
    generation: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ExportSource:
    """One thing to export.

    Attributes:
        kind: ``adapter``, ``merged`` (a folder that ``merge`` wrote), or ``base``.
        name: Its name, for files and for model names.
        folder: Its files.
        base: Of an adapter with a contract, or a merged folder: the base's id; of a base, its own.
        answers: How it was trained to answer.
        revision: The commit of that base, where it is a Hub id and the commit is known.
    """

    kind: Kind
    name: str
    folder: Path
    base: str | None
    answers: AnswerDefaults
    revision: str | None = None


@dataclass(frozen=True)
class WholeModel:
    """A 16-bit checkpoint to write from.

    Attributes:
        folder: Its files.
        merge: The merge that made it on the way; None where it was there.
    """

    folder: Path
    merge: MergeResult | None


def find_source(text: str, store: Path) -> ExportSource:
    """Find what ``text`` names: an adapter of the store first, then a folder by what it holds, then a base.

    Args:
        text: A store name, a folder, ``tiny`` or a Hub id.
        store: The store's folder.

    Raises:
        AdapterError: It names none of these, or an adapter that is broken.
        BaseModelError: A merge report or a base that is broken.
    """
    folder = Path(text)
    if not text:  # pathlib takes it for the current folder
        raise AdapterError("the name of what to export is empty", expected=_KINDS_OF_SOURCES, fix="name one")
    if folder.is_dir() and (folder / MERGE_REPORT_FILE).is_file() and not (store / text / CONFIG_FILE).is_file():
        return _merged(folder)
    try:
        return _adapter(AdapterStore(store).get(text))
    except AdapterError as error:
        if folder.is_dir() and (folder / CONFIG_FILE).is_file():
            raise
        is_base = (folder.is_dir() and (folder / "config.json").is_file()) or text == TINY
        if not is_base and HUB_ID.fullmatch(text.partition("@")[0]) is None:
            raise _unknown(text, store, error) from error
    ref = resolve_base(text)
    return ExportSource("base", Path(ref.id).name, ref.path, ref.id, AnswerDefaults(), ref.revision)


def _unknown(text: str, store: Path, error: QloraKitError) -> AdapterError:
    if (Path(text) / EXPORT_REPORT_FILE).is_file():
        what = f"{text}: is the folder of an export, which is not exported again"
        return AdapterError(what, expected=_KINDS_OF_SOURCES, fix="give what that export was made of")
    if Path(text).is_dir():
        what = f"{text}: the folder holds no adapter, no merged model and no base"
    else:
        what = f"{text!r} is no adapter of {store}, no folder and no base"
    return AdapterError(what, expected=_KINDS_OF_SOURCES, fix=error.faults[0].fix)


def _adapter(folder: Path) -> ExportSource:
    contract = AdapterContract.load(folder) if (folder / CONTRACT_FILE).is_file() else None
    if contract is None:
        return ExportSource("adapter", folder.name, folder, None, AnswerDefaults())
    answers = AnswerDefaults(
        contract.task, contract.system_prompt or None, contract.stop_token_ids, contract.generation
    )
    name = folder.name if contract.name is None else contract.name
    return ExportSource("adapter", name, folder, contract.base.id, answers, contract.base.revision)


def _merged(folder: Path) -> ExportSource:
    fix = "merge again: the folder is not as `merge` wrote it"
    report = read_json_object(folder / MERGE_REPORT_FILE, max_bytes=MAX_REPORT_BYTES, error=BaseModelError, fix=fix)
    stops, generation = report.get("stop_token_ids", []), report.get("generation", {})
    texts = {key: report.get(key) for key in ("adapter", "base", "task", "system_prompt")}
    sound = (
        all(value is None or isinstance(value, str) for value in texts.values())
        and isinstance(stops, list)
        and all(type(token) is int for token in stops)
        and isinstance(generation, dict)
    )
    if not sound:
        raise BaseModelError(
            f"{folder / MERGE_REPORT_FILE}: is not a report of a merge", expected="the file that `merge` wrote", fix=fix
        )
    answers = AnswerDefaults(texts["task"], texts["system_prompt"] or None, tuple(stops), generation)
    return ExportSource("merged", folder.resolve().name, folder, texts["base"], answers)


def described_base(source: ExportSource, base: str | None) -> BaseRef | None:
    """Config and tokenizer files of the model before anything is merged; None where nothing names the base.

    Raises:
        BaseModelError: They cannot be had.
    """
    if source.kind != "adapter":
        return resolve_description(str(source.folder))
    if base is not None:
        return resolve_description(base)
    return None if source.base is None else resolve_description(source.base, source.revision)


def whole_model(
    source: ExportSource,
    work: Path,
    *,
    base: str | None = None,
    onto: Onto = "auto",
    progress: Progress | None = None,
) -> WholeModel:
    """The source as a 16-bit checkpoint; an adapter is merged (and verified) into a folder of its own below ``work``.

    Args:
        source: From ``find_source``.
        work: The folder that the export is written into; ``work / "merged"`` is to be deleted after use.
        base: The adapter's base, where it has no contract.
        onto: What an adapter is merged onto.
        progress: Of the merge.

    Raises:
        AdapterError, BaseModelError, GuardError: As ``merge_adapter``; or the checkpoint is quantized already.
    """
    if source.kind == "adapter":
        merge = merge_adapter(source.folder, work / _MERGED, base=base, onto=onto, progress=progress)
        return WholeModel(work / _MERGED, merge)
    _require_16_bit(source)
    return WholeModel(source.folder, None)


def merge_facts(whole: WholeModel) -> dict[str, Any] | None:
    """The merge that was made on the way, for the report."""
    if whole.merge is None:
        return None
    return {key: value for key, value in whole.merge.to_json().items() if key != "output_dir"}


def _require_16_bit(source: ExportSource) -> None:
    ref = resolve_base(str(source.folder))
    if read_prequantization(read_model_config(ref), where=str(ref.path / "config.json")) is not None:
        raise BaseModelError(
            f"{source.folder}: its files hold 4-bit weights already",
            expected="16-bit weights, which the format quantizes itself",
            fix="give an adapter (it is merged into 16-bit weights on the way), a folder that `merge` wrote, or the "
            "16-bit base",
        )
