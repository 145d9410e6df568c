"""``export_model``: an adapter, a merged model or a base in, one format's files and their report out, or nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from qlora_kit.adapters.store import DEFAULT_STORE
from qlora_kit.atomic import atomic_directory, require_own_folder
from qlora_kit.errors import ConfigError
from qlora_kit.export import bnb_4bit, llama_cpp, ollama, trained_base, vllm
from qlora_kit.export.job import ExportJob, StageProgress, Target, require_possible
from qlora_kit.export.results import REPORT_FILE, ExportedFile, ExportResult, files_in
from qlora_kit.export.source import find_source
from qlora_kit.merging.input_checks import refuse_overlap
from qlora_kit.merging.onto import Onto
from qlora_kit.merging.writing import write_json
from qlora_kit.suggest import advice

REPORT_VERSION = 1
_LIBRARIES = ("torch", "transformers", "bitsandbytes", "gguf")
_ON_A_BASE = frozenset(("base", "onto"))
TARGETS: dict[str, Target] = {
    "bnb-4bit": Target(
        ("adapter", "merged", "base"),
        bnb_4bit.QUANTS,
        _ON_A_BASE,
        bnb_4bit.write_target,
    ),
    "gguf": Target(
        ("adapter", "merged", "base"),
        llama_cpp.QUANTS,
        _ON_A_BASE | {"check"},
        llama_cpp.write_model,
    ),
    "gguf-lora": Target(
        ("adapter",),
        llama_cpp.LORA_QUANTS,
        _ON_A_BASE | {"check"},
        llama_cpp.write_lora,
    ),
    "ollama": Target(
        ("adapter", "merged", "base"),
        llama_cpp.QUANTS,
        _ON_A_BASE | {"check", "separate"},
        ollama.write_target,
    ),
    "vllm": Target(
        ("adapter",),
        (),
        _ON_A_BASE | {"several"},
        vllm.write_target,
    ),
    "base": Target(
        ("adapter", "base"),
        (),
        _ON_A_BASE,
        trained_base.write_target,
    ),
}


def export_model(
    source: str | Path | Sequence[str | Path],
    to: str,
    out: Path,
    *,
    quant: str | None = None,
    base: str | None = None,
    onto: Onto = "auto",
    check: bool = False,
    separate: bool = False,
    store: Path = DEFAULT_STORE,
    overwrite: bool = False,
    progress: StageProgress | None = None,
) -> ExportResult:
    """Write a model in another program's format, verified, or refuse by name what the format cannot carry.

    Formats of whole models take an adapter too: it is merged on the way, and the merge is verified.

    Args:
        source: An adapter (store name or folder), a folder that ``merge`` wrote, or a base; for ``vllm`` several
            adapters.
        to: A name in ``TARGETS``.
        out: The folder to write.
        quant: How weights are quantized (``nf4``, ``q8_0``, ...); the format's default by default.
        base: The adapter's base, in place of the one that its contract names.
        onto: What an adapter is merged onto, or served on: ``dequantized``, ``original``, or ``auto``.
        check: Run what was written in llama.cpp and compare, where its binding is installed.
        separate: For ``ollama``: base and adapter as two files, instead of one merged model.
        store: Where adapters are looked up by name.
        overwrite: Replace ``out`` if it is occupied, by an earlier export alone.
        progress: As ``StageProgress``.

    Raises:
        ConfigError: There is no such format, or an option has no effect with it.
        AdapterError, BaseModelError: The source is broken, or cannot be carried by the format.
        OutputError: ``out`` is occupied or does not fit.
        GuardError: What was written is not what it should be; nothing is left of it.
    """
    started = time.perf_counter()
    if to not in TARGETS:
        raise ConfigError(
            f"--to {to!r}: there is no such format", expected=f"one of {', '.join(TARGETS)}", fix=advice(to, TARGETS)
        )
    target = TARGETS[to]
    texts = [source] if isinstance(source, str | Path) else list(source)
    if not texts:
        raise ConfigError("nothing to export", expected="an adapter, a merged folder or a base", fix="name one")
    job = ExportJob(
        sources=tuple(find_source(str(text), store) for text in texts),
        out=out,
        quant=quant,
        base=base,
        onto=onto,
        check=check,
        separate=separate,
        progress=progress,
    )
    require_possible(to, target, job)
    refuse_overlap(out, {f"{entry.kind} {entry.name}": entry.folder for entry in job.sources})
    if overwrite:
        require_own_folder(out, (REPORT_FILE,))
    with atomic_directory(out, overwrite=overwrite) as folder:
        produced = target.write(job, folder)
        result = ExportResult(
            output_dir=out,
            target=to,
            quant=produced.quant or quant or next(iter(target.quants), None),
            sources=tuple(entry.name for entry in job.sources),
            files=files_in(folder),
            verification=produced.verification,
            remarks=produced.remarks,
            details=produced.details,
            seconds=time.perf_counter() - started,
        )
        return _with_report(result, folder)


def _with_report(result: ExportResult, folder: Path) -> ExportResult:
    content = {key: value for key, value in result.to_json().items() if key != "output_dir"}
    versions = {name: version(name) for name in _LIBRARIES}
    write_json(folder / REPORT_FILE, {"format_version": REPORT_VERSION, **content, "versions": versions})
    report = ExportedFile(REPORT_FILE, (folder / REPORT_FILE).stat().st_size)
    return replace(result, files=(*result.files, report))
