"""``--to base``: the base as its adapters were trained on it, in 16 bits, written once and shared by all of them."""

from __future__ import annotations

from pathlib import Path

from qlora_kit.errors import ConfigError
from qlora_kit.export.job import ExportJob
from qlora_kit.export.results import Produced
from qlora_kit.merging import MergeResult, write_trained_base
from qlora_kit.merging.planning import MergePlan


def write_target(job: ExportJob, folder: Path) -> Produced:
    """Write the trained base into ``folder``, as `merge --base-only` does.

    Raises:
        ConfigError: The original base is asked for.
    """
    if job.onto == "original":
        raise ConfigError(
            "--to base --onto original: the original base is there already",
            expected="--onto dequantized: the weights that 4-bit layers compute with",
            fix="use the base's own files, or leave --onto out",
        )
    is_adapter = job.source.kind == "adapter"
    result = write_trained_base(
        folder / "base",
        base=job.base if is_adapter else job.source.base,
        revision=None if is_adapter else job.source.revision,
        adapter=job.source.folder if is_adapter else None,
        progress=job.stage("writing"),
    )
    for path in sorted((folder / "base").iterdir()):
        path.rename(folder / path.name)
    (folder / "base").rmdir()
    verification = None if result.verification is None else result.verification.to_json()
    return Produced(verification, (), {"base": result.base, "onto": result.onto})


def write_plan_base(job: ExportJob, plan: MergePlan, folder: Path) -> MergeResult:
    """Write the base that the adapter of ``plan`` was trained on, beside other files of an export.

    Without a contract nothing says how it was quantized: NF4 with double quantization.

    Raises:
        GuardError: The written files are not that base.
    """
    is_known = plan.contract is not None
    return write_trained_base(
        folder,
        base=job.base if is_known else str(plan.base.path),
        adapter=job.source.folder if is_known else None,
        progress=job.stage("writing the trained base"),
    )
