"""The model card of what is published: reports and contract in, the text of ``README.md`` out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.adapters import CONTRACT_FILE, AdapterContract, AdapterStore
from qlora_kit.adapters.gate import CONFIG_FILE
from qlora_kit.adapters.lora_settings import read_lora_settings
from qlora_kit.adapters.trained_base import MAX_REPORT_BYTES, TRAINED_BASE
from qlora_kit.adapters.trained_base import REPORT_FILE as MERGE_REPORT_FILE
from qlora_kit.base_files import HUB_ID
from qlora_kit.errors import AdapterError, BaseModelError
from qlora_kit.export.results import REPORT_FILE
from qlora_kit.metrics import METRICS
from qlora_kit.safetensors_header import shown
from qlora_kit.strict_json import read_json_object

CARD_FILE = "README.md"
_FIX = "write the folder again: its report is not as the kit wrote it"
_LIBRARIES = {"adapter": "peft", "merged": "transformers", "bnb-4bit": "transformers", "base": "transformers"}
_SUMMARIES = {
    "adapter": "A LoRA adapter{base}.",
    "merged": "{names}, merged into a full model{base}.",
    "bnb-4bit": "{names}{base} as bitsandbytes' 4-bit files; they load without being quantized again.",
    "gguf": "{names}{base} as GGUF, for llama.cpp.",
    "gguf-lora": "The adapter {names}{base} as GGUF, for llama.cpp.",
    "ollama": "{names}{base} as GGUF with a Modelfile, for Ollama.",
    "vllm": "{names}{base}, with a script that serves them by vLLM.",
    "base": "{names} as 4-bit layers compute with it, in 16 bits: the base that its adapters were trained on.",
}
_SCORES = ("train_loss", "eval_loss", "stop_rate", "task_metric")


@dataclass(frozen=True)
class Published:
    """What a folder holds.

    Attributes:
        kind: ``adapter``, ``merged`` or the name of an export's format.
        names: The adapters in it, or the model's name.
        base: The base's id; None where nothing says.
        contracts: Of the adapters, as far as they are at hand.
        verification: What was measured on the files; None where nothing was.
        report: The report itself; empty for an adapter.
        files: Names of the files in the folder.
    """

    kind: str
    names: tuple[str, ...]
    base: str | None
    contracts: tuple[AdapterContract, ...]
    verification: Mapping[str, Any] | None
    report: Mapping[str, Any]
    files: tuple[str, ...]


def published(folder: Path, store: Path) -> Published:
    """Read what ``folder`` is from its own files; data and scores of merged adapters from the store, if they are there.

    Raises:
        AdapterError, BaseModelError: It is nothing that can be published, or its files are broken.
    """
    files = tuple(sorted(path.name for path in folder.iterdir() if path.is_file()))
    if (folder / REPORT_FILE).is_file():
        report = _read(folder / REPORT_FILE)
        target, names, base = _order(report, folder / REPORT_FILE)
        contracts = _contracts(store, names)
        base = base or next((contract.base.id for contract in contracts), None)
        if target == "base":  # the adapter that named it is no part of it
            names, contracts = names if base is None else (base,), ()
        return Published(target, names, base, contracts, _part(report, "verification"), report, files)
    if (folder / MERGE_REPORT_FILE).is_file():
        report = _read(folder / MERGE_REPORT_FILE)
        name = report.get("adapter")
        contracts = _contracts(store, (str(name),), base_fingerprint=report.get("base_fingerprint"))
        verification = _part(report, "verification") or None
        kind = "base" if report.get("kind") == TRAINED_BASE else "merged"
        base = _text(report, "base")
        names = (str(name or (kind == "base" and base) or folder.resolve().name),)
        return Published(kind, names, base, contracts, verification, report, files)
    if (folder / CONFIG_FILE).is_file():
        settings = read_lora_settings(folder / CONFIG_FILE)
        contract = AdapterContract.load(folder) if (folder / CONTRACT_FILE).is_file() else None
        base = settings.base_model_name_or_path if contract is None else contract.base.id
        own = () if contract is None else (contract,)
        named = folder.resolve().name if contract is None or contract.name is None else contract.name
        return Published("adapter", (named,), base, own, None, {}, files)
    raise AdapterError(
        f"{folder}: the folder holds no merged model, no export and no adapter",
        expected=f"{MERGE_REPORT_FILE}, {REPORT_FILE} or {CONFIG_FILE} in it",
        fix="give what `qlora-kit merge`, `export` or `train` wrote",
    )


def write_card(about: Published, repo_id: str) -> str:
    """The card: what it is, base, data, scores, what was verified, and how to run it."""
    on_hub = about.base is not None and HUB_ID.fullmatch(about.base) is not None
    front = {
        "base_model": about.base if on_hub else None,
        "library_name": _LIBRARIES.get(about.kind),
        "pipeline_tag": "text-generation",
    }
    lines = [f"{key}: {value}" for key, value in front.items() if value is not None]
    tags = ["qlora", "lora" if about.kind in ("adapter", "vllm", "gguf-lora") else "merged"]
    sections = [
        f"---\n{chr(10).join(lines)}\ntags: [{', '.join(tags)}]\n---\n\n# {repo_id.partition('/')[2]}",
        _summary(about),
        *(_trained(contract) for contract in about.contracts),
        _measured(about),
        f"## How to run\n\n{_how_to_run(about, repo_id)}",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _read(path: Path) -> dict[str, Any]:
    return read_json_object(path, max_bytes=MAX_REPORT_BYTES, error=BaseModelError, fix=_FIX)


def _order(report: Mapping[str, Any], path: Path) -> tuple[str, tuple[str, ...], str | None]:
    """What was exported: the format, the sources' names, and the base where the report says it."""
    target, names = report.get("target"), report.get("sources")
    if target not in _SUMMARIES or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BaseModelError(f"{path}: is no report of an export", expected="the file that `export` wrote", fix=_FIX)
    return str(target), tuple(names), _text(report, "base") or _text(_part(report, "merge"), "base")


def _part(report: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A section of a report; empty where it has none."""
    part = report.get(key)
    if part is not None and not isinstance(part, dict):
        raise _unsound(key, part)
    return part or {}


def _text(report: Mapping[str, Any], key: str) -> str | None:
    text = report.get(key)
    if text is not None and not isinstance(text, str):
        raise _unsound(key, text)
    return text


def _figure(found: Mapping[str, Any], key: str) -> float:
    figure = found.get(key)
    if not isinstance(figure, int | float) or isinstance(figure, bool):
        raise _unsound(key, figure)
    return figure


def _unsound(key: str, value: object) -> BaseModelError:
    what = f"the folder's report: {key} is {shown(repr(value))}"
    return BaseModelError(what, expected="the report that `merge` or `export` wrote", fix=_FIX)


def _contracts(store: Path, names: Sequence[str], *, base_fingerprint: object = None) -> tuple[AdapterContract, ...]:
    """The contracts of these adapters in the store; of another base's adapter of the same name, none."""
    found = []
    for name in names:
        try:
            contract = AdapterStore(store).show(name).contract
        except AdapterError:  # it was merged from elsewhere
            continue
        if contract is not None and base_fingerprint in (None, contract.base.fingerprint):
            found.append(contract)
    return tuple(found)


def _summary(about: Published) -> str:
    names = ", ".join(f"`{name}`" for name in about.names)
    base = "" if about.base is None else f" on `{about.base}`"
    return _SUMMARIES[about.kind].format(names=names, base=base) + " Made with QLoRA Kit."


def _trained(contract: AdapterContract) -> str:
    """Task, data and scores of one adapter."""
    rows = [f"- task: {contract.task}"]
    if contract.system_prompt:
        rows.append(f"- system prompt: {json.dumps(contract.system_prompt, ensure_ascii=False)}")
    settings = contract.quantization
    if settings.get("load_in_4bit"):
        rows.append(f"- trained on the base in 4 bits ({settings.get('bnb_4bit_quant_type')})")
    else:
        rows.append("- trained on the base in 16 bits")
    for file in contract.data:
        rows.append(f"- {file.split} data: {file.name}, {file.rows:,} rows")
    scores = [
        f"| {key} | {value:.4g} |"
        for key, value in contract.metrics.items()
        if (key in METRICS or key in _SCORES) and type(value) in (int, float)
    ]
    table = "\n\n| measured in training | |\n|---|---|\n" + "\n".join(scores) if scores else ""
    name = "" if contract.name is None else f" of `{contract.name}`"
    return f"## Training{name}\n\n" + "\n".join(rows) + table


def _measured(about: Published) -> str:
    lines = [*_merge_lines(about), *_export_lines(about)]
    return "" if not lines else "## Verified\n\n" + "\n".join(f"- {line}" for line in lines)


def _merge_lines(about: Published) -> Iterator[str]:
    merge = about.report if about.kind in ("merged", "base") else _part(about.report, "merge")
    if not merge:
        return
    found = _part(merge, "verification")
    done, live = f"merged onto {merge.get('onto')} weights", "base + adapter"
    if about.kind == "base":
        done, live = "the codes of 4-bit layers, dequantized", "the base in 4 bits"
    yield done + ("" if found else "; not verified")
    if found:
        yield (
            f"the written weights against {live}: logits differ by {_figure(found, 'max_abs_logit_diff'):.2g} at most, "
            f"the likeliest token is the same at {_figure(found, 'top1_agreement'):.2%}"
        )


def _export_lines(about: Published) -> Iterator[str]:
    if about.kind in ("merged", "adapter", "base"):
        return
    found = about.verification or {}
    rounding = _part(found, "second_rounding")
    if rounding:
        logits = _part(rounding, "logits")
        same = f"the same likeliest token at {_figure(logits, 'top1_agreement'):.2%}"
        yield f"4 bits against 16: KL {_figure(logits, 'kl'):.2g}, {same}"
        yield str(rounding.get("advice"))
    elif found.get("checked"):
        yield f"llama.cpp against transformers: the same likeliest token at {_figure(found, 'top1_agreement'):.2%}"
    elif found.get("reason"):
        yield str(found["reason"])


def _how_to_run(about: Published, repo_id: str) -> str:
    if about.kind == "adapter":
        text = f"qlora-kit generate 'Hello' --adapter {about.names[0]}{'' if about.contracts else ' --base BASE'}"
        return (
            f"```\nhf download {repo_id} --local-dir {about.names[0]}\n{text}\n```\n\nor with PEFT:\n\n```python\n"
            f'PeftModel.from_pretrained(base, "{repo_id}")\n```'
        )
    if about.kind in ("merged", "bnb-4bit", "base"):
        return (
            "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{repo_id}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")\n```'
        )
    download = f"hf download {repo_id} --local-dir model && cd model"
    gguf = next((name for name in about.files if name.endswith(".gguf")), "MODEL.gguf")
    commands = {
        "gguf": f"llama-server -m {gguf}",
        "gguf-lora": f"llama-server -m BASE.gguf --lora {gguf}",
        "ollama": f"ollama create {repo_id.partition('/')[2].lower()} -f Modelfile",
        "vllm": "sh serve.sh",
    }
    return f"```\n{download}\n{commands[about.kind]}\n```"
