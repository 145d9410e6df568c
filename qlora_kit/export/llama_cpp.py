"""``--to gguf`` and ``--to gguf-lora``: a model, or an adapter alone, as GGUF, and llama.cpp's word on it if asked."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_kit.base_files import BaseRef, read_model_config
from qlora_kit.export.drift import measure_drift, plan_adapter
from qlora_kit.export.gguf_check import check_gguf, is_binding_installed, require_agreement, require_binding
from qlora_kit.export.gguf_kquants import find_quantizer
from qlora_kit.export.gguf_lora import LORA_QUANTS, write_gguf_lora
from qlora_kit.export.gguf_metadata import read_gguf_model
from qlora_kit.export.gguf_model import write_gguf
from qlora_kit.export.gguf_quants import QUANTS as GGUF_QUANTS
from qlora_kit.export.gguf_quants import find_quant
from qlora_kit.export.gguf_results import GgufFile
from qlora_kit.export.job import ExportJob
from qlora_kit.export.results import Produced
from qlora_kit.export.source import WholeModel, described_base, merge_facts, whole_model
from qlora_kit.export.trained_base import write_plan_base
from qlora_kit.merging.planning import MergePlan

DEFAULT_QUANT = "q8_0"
QUANTS = (DEFAULT_QUANT, *(name for name in GGUF_QUANTS if name != DEFAULT_QUANT))
NOT_ASKED = "not checked in llama.cpp: --check was not given"
NO_BINDING = "not checked in llama.cpp: its binding is not installed (`pip install 'qlora-kit[gguf-test]'`)"
_ODD = re.compile(r"[^A-Za-z0-9._-]+")


def write_model(job: ExportJob, folder: Path) -> Produced:
    """Write the model into ``folder`` as one GGUF file."""
    require_writable(job)
    whole = whole_model(job.source, folder, base=job.base, onto=job.onto, progress=job.stage("merging"))
    file = write_model_file(job, whole, folder / f"{file_name(job.source.name)}-{job.quant or DEFAULT_QUANT}.gguf")
    verification = checked(job, file, whole.folder)
    if whole.merge is not None:
        shutil.rmtree(whole.folder)
    return Produced(verification, _remarks(verification), {"gguf": file.to_json(), "merge": merge_facts(whole)})


def require_writable(job: ExportJob) -> BaseRef | None:
    """Refuse, before anything is merged, what GGUF cannot hold or this machine cannot quantize; returns the base.

    Raises:
        ConfigError: The quantization needs a program that is not there, or llama.cpp is asked for and does not start.
        BaseModelError: llama.cpp does not compute bases of this kind alike.
    """
    _require_check(job)
    quant = find_quant(job.quant or DEFAULT_QUANT)
    if quant.quantizer is not None:
        find_quantizer(quant)
    ref = described_base(job.source, job.base)
    if ref is not None:
        read_gguf_model(read_model_config(ref), where=str(ref.path / "config.json"))
    return ref


def write_model_file(job: ExportJob, whole: WholeModel, path: Path) -> GgufFile:
    """Write one GGUF file of a whole model."""
    return write_gguf(
        whole.folder, path, quant=job.quant or DEFAULT_QUANT, name=job.source.name, progress=job.stage("writing")
    )


def write_lora(job: ExportJob, folder: Path) -> Produced:
    """Write the adapter alone into ``folder``, and measure what the original base would do to it."""
    _require_check(job)
    plan = plan_adapter(job.source.folder, job.out, base=job.base, onto=job.onto)
    path = folder / f"{file_name(job.source.name)}-lora.gguf"
    file = write_gguf_lora(
        job.source.folder, plan.base.path, path, quant=job.quant or LORA_QUANTS[0], progress=job.stage("writing")
    )
    verification = _checked_lora(job, plan, file, folder)
    job.begin("measuring the drift on the original base")
    drift = measure_drift(plan)
    remarks = [*_remarks(verification)]
    if plan.quantization.load_in_4bit:
        remarks.append(
            "put it on the base as it was trained: `qlora-kit export ADAPTER --to base`, then that folder --to gguf; "
            f"on the original base: {drift}"
        )
    return Produced(verification, tuple(remarks), {"gguf": file.to_json(), "original_base": drift.to_json()})


def checked(
    job: ExportJob, file: GgufFile, model: Path, *, lora: GgufFile | None = None, adapter: Path | None = None
) -> dict[str, Any]:
    """llama.cpp's agreement with transformers on the file, or why it was not asked.

    Raises:
        GuardError: They do not agree.
    """
    if not job.check:
        return {"checked": False, "reason": NOT_ASKED}
    if not is_binding_installed():
        return {"checked": False, "reason": NO_BINDING}
    job.begin("checking in llama.cpp")
    check = check_gguf(file, model, system_prompt=job.source.answers.system_prompt, lora=lora, adapter_dir=adapter)
    require_agreement(check, file)
    return check.to_json()


def served_base(job: ExportJob, plan: MergePlan, work: Path) -> Path:
    """The 16-bit folder of the base that the adapter is served on; the trained base is made for it, below ``work``."""
    if plan.onto == "original":
        return plan.base.path
    write_plan_base(job, plan, work / "trained")
    return work / "trained"


def file_name(name: str) -> str:
    """A name for files: letters, digits, dots, dashes and underscores."""
    return _ODD.sub("-", name).strip("-.") or "model"


def _require_check(job: ExportJob) -> None:
    """Refuse, before anything is merged, a check by a binding that is installed and does not start."""
    if job.check and is_binding_installed():
        require_binding()


def _checked_lora(job: ExportJob, plan: MergePlan, file: GgufFile, folder: Path) -> dict[str, Any]:
    """As ``checked``, on the base that the adapter was trained on or is served on, written in fp32 and deleted."""
    if not job.check or not is_binding_installed():
        return checked(job, file, plan.base.path)
    work = folder / "check"
    work.mkdir()
    base = served_base(job, plan, work)
    base_file = write_gguf(base, work / "base.gguf", quant="f32", name=base.name)
    found = checked(job, base_file, base, lora=file, adapter=job.source.folder)
    shutil.rmtree(work)
    return found


def _remarks(verification: Mapping[str, Any]) -> tuple[str, ...]:
    return () if verification["checked"] else (str(verification["reason"]),)
