"""``--to vllm``: adapters that vLLM can load, the base they were trained on, and a script that serves them together."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_kit.adapters import AdapterFiles, check_adapter_folder, check_name
from qlora_kit.adapters.card import own_files
from qlora_kit.adapters.trained_base import TrainedBase, read_trained_base
from qlora_kit.architecture import HEAD
from qlora_kit.base_files import HUB_ID, BaseRef, read_model_config
from qlora_kit.config.serving_targets import LIMITS, VLLM, adapter_faults, base_problems
from qlora_kit.errors import AdapterError, Fault
from qlora_kit.export.drift import Drift, measure_drift, plan_adapter
from qlora_kit.export.job import ExportJob
from qlora_kit.export.results import Produced
from qlora_kit.export.source import ExportSource
from qlora_kit.export.trained_base import write_plan_base
from qlora_kit.export.vllm_script import ServedAdapter, ServedBase, read_me, serve_script
from qlora_kit.merging.planning import MergePlan

BASE_FOLDER, ADAPTERS_FOLDER = "base", "adapters"
SCRIPT, README = "serve.sh", "README.md"
_RAN = "vLLM was not run here; its limits are those of its source, version 0.33"


@dataclass(frozen=True)
class _Adapter:
    source: ExportSource
    files: AdapterFiles
    plan: MergePlan


def write_target(job: ExportJob, folder: Path) -> Produced:
    """Copy the adapters into ``folder``, write the base they were trained on, and the script that serves both.

    Raises:
        AdapterError: vLLM cannot serve one of the adapters, or they belong on different bases; with every fault.
    """
    files = [check_adapter_folder(source.folder) for source in job.sources]
    _require_servable(job.sources, files)
    given = None if job.base is None or not Path(job.base).is_dir() else read_trained_base(Path(job.base))
    adapters = [
        _Adapter(source, found, _plan(job, source, given)) for source, found in zip(job.sources, files, strict=True)
    ]
    _require_one_base(adapters)
    _require_family(adapters)
    first = adapters[0].plan
    merge = None
    if given is not None:
        served = ServedBase(str(given.folder.resolve()), None, _served_name(adapters))
    elif first.onto == "dequantized":
        merge = write_plan_base(job, first, folder / BASE_FOLDER)
        served = ServedBase(BASE_FOLDER, None, _served_name(adapters))
    else:
        served = _original(first.base, _served_name(adapters))
    drifts: dict[str, Drift] = {}
    if first.onto == "original":
        job.begin("measuring the drift on the original base")
        drifts = {entry.source.name: measure_drift(entry.plan) for entry in adapters}
    for entry in adapters:
        _copy(entry, folder)
    texts = [_served(entry) for entry in adapters]
    script = folder / SCRIPT
    script.write_text(serve_script(served, texts), encoding="utf-8")
    script.chmod(0o755)
    notes = _remarks(adapters, drifts)
    (folder / README).write_text(read_me(served, texts, notes), encoding="utf-8")
    verified = None if merge is None or merge.verification is None else merge.verification.to_json()
    verification = {
        "checked": False,
        "reason": _RAN,
        "base": verified,
        "drift": {name: drift.to_json() for name, drift in drifts.items()},
    }
    return Produced(verification, (_RAN, *notes), {"onto": first.onto, "base": first.base.id})


def _require_servable(sources: Sequence[ExportSource], found: Sequence[AdapterFiles]) -> None:
    faults = [fault for source, files in zip(sources, found, strict=True) for fault in _lint(source, files)]
    if faults:
        raise AdapterError.of(faults)


def _lint(source: ExportSource, files: AdapterFiles) -> Iterator[Fault]:
    """What vLLM would refuse in one adapter, or load wrongly."""
    yield from adapter_faults(source.folder, files.config, VLLM)
    try:
        check_name(source.name)
    except AdapterError as error:
        for fault in error.faults:
            yield Fault(f"{source.folder}: {fault.what}", fault.expected, fault.fix)


def _require_family(adapters: Sequence[_Adapter]) -> None:
    family = str(read_model_config(adapters[0].plan.base).get("model_type"))
    faults = [
        Fault(f"{entry.source.folder}: {problem.what}", problem.expected, LIMITS[VLLM].merged)
        for entry in adapters
        for problem in base_problems(
            family, (VLLM,), adapts_head=any(HEAD in name.split(".") for name in entry.files.pairs), token_rows=()
        )
    ]
    if faults:
        raise AdapterError.of(faults)


def _plan(job: ExportJob, source: ExportSource, given: TrainedBase | None) -> MergePlan:
    """The adapter on its base; on a trained base that is there already, its contract must name that one."""
    plan = plan_adapter(source.folder, job.out, base=job.base if given is None else None, onto=job.onto)
    if given is not None:
        if plan.contract is None:
            raise AdapterError(
                f"{source.folder}: has no contract that says whether it belongs on {given.folder}",
                expected="an adapter with a contract",
                fix="write one: `qlora-kit adapters adopt`",
            )
        given.require_match(plan.contract)
    return plan


def _require_one_base(adapters: Sequence[_Adapter]) -> None:
    """A server has one base: the same files, quantized in the same way, for all of its adapters."""
    first = adapters[0].plan
    faults = []
    for entry in adapters[1:]:
        plan = entry.plan
        same_files = plan.base.path.resolve() == first.base.path.resolve()
        same_way = plan.onto == first.onto and (plan.onto == "original" or _way(plan) == _way(first))
        if same_files and same_way:
            continue
        what = (
            f"{entry.source.folder}: belongs on {plan.base.id} ({_told(plan)}), "
            f"{adapters[0].source.name} on {first.base.id} ({_told(first)})"
        )
        faults.append(Fault(what, "adapters of one base, trained on it in one way", "export them apart"))
    if faults:
        raise AdapterError.of(faults)


def _way(plan: MergePlan) -> tuple[object, ...]:
    settings = plan.quantization
    return settings.load_in_4bit, settings.bnb_4bit_quant_type, settings.bnb_4bit_use_double_quant


def _told(plan: MergePlan) -> str:
    if plan.onto == "original":
        return "its original weights"
    double = " with double quantization" if plan.quantization.bnb_4bit_use_double_quant else ""
    return f"as {plan.quantization.bnb_4bit_quant_type}{double} computes with it"


def _original(base: BaseRef, name: str) -> ServedBase:
    if base.revision is not None and HUB_ID.fullmatch(base.id):
        return ServedBase(base.id, base.revision, name)
    return ServedBase(str(base.path.resolve()), None, name)


def _served_name(adapters: Sequence[_Adapter]) -> str:
    name = Path(adapters[0].plan.base.id).name
    taken = {entry.source.name for entry in adapters}
    return f"{name}-base" if name in taken else name


def _copy(entry: _Adapter, folder: Path) -> None:
    target = folder / ADAPTERS_FOLDER / entry.source.name
    target.mkdir(parents=True)
    for name in own_files(entry.source.folder):
        shutil.copyfile(entry.source.folder / name, target / name)


def _served(entry: _Adapter) -> ServedAdapter:
    settings = entry.files.config
    return ServedAdapter(
        name=entry.source.name,
        folder=f"{ADAPTERS_FOLDER}/{entry.source.name}",
        rank=max(pair.r for pair in entry.files.pairs.values()),
        has_patterns=bool(settings.rank_pattern or settings.alpha_pattern),
        answers=entry.source.answers,
    )


def _remarks(adapters: Sequence[_Adapter], drifts: Mapping[str, Drift]) -> list[str]:
    notes = ["vLLM rounds the adapter's factors to the base's dtype; what that costs was not measured"]
    for entry in adapters:
        name = entry.source.name
        if name in drifts and entry.plan.quantization.load_in_4bit:
            notes.append(f"{name} was trained on the 4-bit base and is served on the original: {drifts[name]}")
    return notes
