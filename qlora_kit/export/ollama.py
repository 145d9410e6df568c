"""``--to ollama``: GGUF files and a Modelfile that renders, stops and samples as the model was trained to."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.adapters.trained_base import MAX_REPORT_BYTES
from qlora_kit.base_files import BaseRef
from qlora_kit.data.chat import stop_token_ids
from qlora_kit.errors import ConfigError
from qlora_kit.export.drift import plan_adapter
from qlora_kit.export.gguf_lora import write_gguf_lora
from qlora_kit.export.gguf_model import write_gguf
from qlora_kit.export.gguf_results import GgufFile
from qlora_kit.export.go_template import TurnTexts, read_turn_texts
from qlora_kit.export.job import ExportJob
from qlora_kit.export.llama_cpp import (
    DEFAULT_QUANT,
    checked,
    file_name,
    require_writable,
    served_base,
    write_model_file,
)
from qlora_kit.export.modelfile import Modelfile, sampling_parameters, write_modelfile
from qlora_kit.export.results import Produced
from qlora_kit.export.source import merge_facts, whole_model
from qlora_kit.models import load_tokenizer
from qlora_kit.strict_json import read_json_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODELFILE, README = "Modelfile", "README.md"
_GENERATION_FILE = "generation_config.json"


def write_target(job: ExportJob, folder: Path) -> Produced:
    """Write GGUF, Modelfile and a short README into ``folder``: one merged model, or base and adapter apart."""
    quant = job.quant or DEFAULT_QUANT
    ref = require_writable(job)
    if ref is not None:  # what a Modelfile cannot say is told before anything is merged
        read_turn_texts(load_tokenizer(ref))
        sampling_parameters(_generation(job, ref.path))
    if job.separate:
        return _write_separate(job, folder, quant)
    whole = whole_model(job.source, folder, base=job.base, onto=job.onto, progress=job.stage("merging"))
    tokenizer = load_tokenizer(BaseRef(job.source.name, whole.folder))
    texts = _turn_texts(tokenizer)
    file = write_model_file(job, whole, folder / f"model-{quant}.gguf")
    verification = checked(job, file, whole.folder)
    modelfile = _modelfile(job, texts, tokenizer, whole.folder, file=file, lora=None)
    if whole.merge is not None:
        shutil.rmtree(whole.folder)
    return _finished(job, folder, modelfile, verification, {"gguf": file.to_json(), "merge": merge_facts(whole)})


def _write_separate(job: ExportJob, folder: Path, quant: str) -> Produced:
    """The base as it was trained, and the adapter beside it."""
    plan = plan_adapter(job.source.folder, job.out, base=job.base, onto=job.onto)
    tokenizer = load_tokenizer(plan.base)
    texts = _turn_texts(tokenizer)
    lora = write_gguf_lora(job.source.folder, plan.base.path, folder / "adapter.gguf")
    work = folder / "work"
    work.mkdir()
    base = served_base(job, plan, work)
    file = write_gguf(
        base, folder / f"base-{quant}.gguf", quant=quant, name=Path(plan.base.id).name, progress=job.stage("writing")
    )
    verification = checked(job, file, base, lora=lora, adapter=job.source.folder)
    modelfile = _modelfile(job, texts, tokenizer, base, file=file, lora=lora)
    shutil.rmtree(work)
    details = {"gguf": file.to_json(), "gguf_lora": lora.to_json(), "onto": plan.onto}
    return _finished(job, folder, modelfile, verification, details)


def _finished(
    job: ExportJob, folder: Path, modelfile: Modelfile, verification: Mapping[str, Any], details: Mapping[str, Any]
) -> Produced:
    (folder / MODELFILE).write_text(modelfile.text, encoding="utf-8")
    (folder / README).write_text(_readme(job), encoding="utf-8")
    remarks = modelfile.remarks
    if not verification["checked"]:
        remarks = (*remarks, str(verification["reason"]))
    return Produced(verification, remarks, details)


def _turn_texts(tokenizer: PreTrainedTokenizerBase) -> TurnTexts:
    """The template's texts, without a BOS that llama.cpp puts before every text itself."""
    texts = read_turn_texts(tokenizer)
    bos = tokenizer.bos_token
    if bos is None or list(tokenizer("a")["input_ids"])[:1] != [tokenizer.bos_token_id]:
        return texts
    system = None if texts.system is None else (texts.system[0].removeprefix(bos), texts.system[1])
    return replace(texts, opening=texts.opening.removeprefix(bos), system=system)


def _modelfile(
    job: ExportJob,
    texts: TurnTexts,
    tokenizer: PreTrainedTokenizerBase,
    model: Path,
    *,
    file: GgufFile,
    lora: GgufFile | None,
) -> Modelfile:
    answers = job.source.answers
    stops = answers.stop_token_ids or stop_token_ids(tokenizer)
    return write_modelfile(
        texts,
        weights=file.path.name,
        adapter=None if lora is None else lora.path.name,
        system_prompt=answers.system_prompt,
        stops=_token_texts(tokenizer, stops),
        generation=_generation(job, model),
        context_tokens=file.context_length,
    )


def _token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    return [str(text) for text in tokenizer.convert_ids_to_tokens(list(ids))]


def _generation(job: ExportJob, model: Path) -> dict[str, Any]:
    """Generation defaults: the model's own file's, and over them those that were trained with."""
    path = model / _GENERATION_FILE
    own = {}
    if path.is_file():
        own = read_json_object(path, max_bytes=MAX_REPORT_BYTES, error=ConfigError, fix="copy the model's file again")
    return {**own, **job.source.answers.generation}


def _readme(job: ExportJob) -> str:
    prompt = job.source.answers.system_prompt
    about = "" if prompt is None else f"It was trained with the system prompt {prompt!r}, which the Modelfile sets.\n\n"
    task = "" if job.source.answers.task is None else f" (task {job.source.answers.task})"
    name = file_name(job.source.name).lower()
    return (
        f"# {job.source.name} for Ollama\n\n`{job.source.name}`{task}, exported by qlora-kit.\n\n{about}"
        f"```\nollama create {name} -f Modelfile\nollama run {name}\n```\n\n"
        "The template renders what the chat template rendered in training, and sampling is what it was evaluated with. "
        "`export_report.json` holds what was verified.\n"
    )
