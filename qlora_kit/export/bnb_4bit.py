"""``--to bnb-4bit``: a checkpoint that loads in 4 bits without being quantized again, and what the rounding costs."""

from __future__ import annotations

import shutil
from pathlib import Path

from qlora_kit.config import QuantizationSection
from qlora_kit.export.bnb_4bit_files import require_same_weights, write_bnb_4bit
from qlora_kit.export.drift import plan_adapter
from qlora_kit.export.job import ExportJob
from qlora_kit.export.results import Produced
from qlora_kit.export.second_rounding import measure_second_rounding
from qlora_kit.export.source import merge_facts, whole_model
from qlora_kit.merging.planning import MergePlan
from qlora_kit.prequantized import QuantType

QUANTS: tuple[QuantType, ...] = ("nf4", "fp4")


def write_target(job: ExportJob, folder: Path) -> Produced:
    """Quantize the model into ``folder``, verify the files, and measure what the second rounding costs."""
    plan = None
    if job.source.kind == "adapter":  # what is wrong with it is told before anything is written
        plan = plan_adapter(job.source.folder, job.out, base=job.base, onto=job.onto)
    quant_type, double_quant = _quantization(job, plan)
    whole = whole_model(job.source, folder, base=job.base, onto=job.onto, progress=job.stage("merging"))
    written = write_bnb_4bit(
        whole.folder,
        folder,
        quant_type=quant_type,
        double_quant=double_quant,
        progress=job.stage("quantizing"),
    )
    settings = {"quant_type": quant_type, "double_quant": double_quant}
    job.begin("measuring what the second rounding costs")
    checked = require_same_weights(whole.folder, folder, quant_type=quant_type, double_quant=double_quant)
    cost = measure_second_rounding(whole.folder, folder, plan=plan, system_prompt=job.source.answers.system_prompt)
    if whole.merge is not None:
        shutil.rmtree(whole.folder)
    verification = {"passed": True, "four_bit_weights": checked, "second_rounding": cost.to_json()}
    details = {"quantization": settings, "weight_bytes": written.weight_bytes, "merge": merge_facts(whole)}
    return Produced(verification, (f"advice: {cost.advice}",), details, quant=quant_type)


def _quantization(job: ExportJob, plan: MergePlan | None) -> tuple[QuantType, bool]:
    """As asked for; else as the adapter was trained; else NF4 with double quantization."""
    settings = QuantizationSection() if plan is None else plan.quantization
    if not settings.load_in_4bit:
        settings = QuantizationSection()
    if job.quant is not None:
        quant: QuantType = "fp4" if job.quant == "fp4" else "nf4"
        return quant, settings.bnb_4bit_use_double_quant
    return settings.bnb_4bit_quant_type, settings.bnb_4bit_use_double_quant
