"""Makes the page of a report: a run and its charts in, one HTML text out that loads nothing from anywhere.

Every text of the run is escaped by the template; the page has no script, and its policy forbids any, as well as every
style sheet but its own.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from qlora_kit.data.ledger import locate
from qlora_kit.report.charts import Bars, Chart, number
from qlora_kit.report.record import Run, Sample, SplitData
from qlora_kit.report.svg import bars_svg, chart_svg, legend
from qlora_kit.units import in_time, in_units

HASH_DIGITS = 12
ENDINGS = {"stop": "ended by itself", "length": "cut off at the limit of answers"}


@dataclass(frozen=True)
class Tile:
    """One figure of the headline, and what it is."""

    label: str
    value: str
    detail: str


def page(run: Run, charts: Sequence[Chart | Bars]) -> str:
    """The whole page; the same run gives the same text.

    Args:
        run: From ``read_run``.
        charts: What is drawn, in this order.
    """
    here = files("qlora_kit.report")
    style = here.joinpath("page.css").read_text(encoding="utf-8")
    template = here.joinpath("page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    contract = run.contract
    return environment.from_string(template).render(
        contract=contract,
        style=Markup(style),
        style_sha256=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        finished=contract.created.replace("T", " ").replace("+00:00", " UTC"),
        tiles=_tiles(run),
        figures=[_figure(chart) for chart in charts if isinstance(chart, Chart)],
        histograms=[bars_svg(chart) for chart in charts if isinstance(chart, Bars)],
        samples=[_sample(sample) for sample in run.record.samples],
        data=_data_table(run.record.data),
        data_files=[(file.split, file.name, f"{file.rows:,}", file.sha256[:HASH_DIGITS]) for file in contract.data],
        changed_rows=sum(run.actions.values()),
        entries=[(locate(entry.file, entry.line), entry.action, entry.reason) for entry in run.entries],
        facts=_facts(run),
        config_text=run.config_text,
    )


def _tiles(run: Run) -> list[Tile]:
    record = run.record
    kept = f"of the adapter that was kept, step {record.kept_step:,} of {record.steps:,}"
    tiles = [
        Tile("validation loss", "none", "no validation loss was measured")
        if record.eval_loss is None
        else Tile("validation loss", number(record.eval_loss), kept)
    ]
    for name in run.contract.metric_names:
        measured = dict(record.logged(f"eval_{name}")).get(record.kept_step)
        if measured is not None:
            tiles.append(Tile(f"validation {name}", number(measured), kept))
    if record.stop_rate is not None:
        detail = "of the answers to validation prompts end by themselves"
        tiles.append(Tile("stop rate", f"{record.stop_rate:.0%}", detail))
    where = "resident in the process" if record.device == "CPU" else f"allocated on the {record.device}"
    return [
        *tiles,
        Tile("training loss", number(record.train_loss), "of the last log interval"),
        Tile("time", in_time(record.seconds), f"for {record.steps:,} steps, evaluations included"),
        Tile("speed", f"{record.tokens_per_second:,.0f}", "tokens a second"),
        Tile("peak memory", in_units(record.peak_bytes), where),
    ]


def _figure(chart: Chart) -> dict[str, Any]:
    notes = [chart.note] if chart.note else []
    if chart.logarithmic:
        notes.insert(0, "Logarithmic scale.")
    return {"title": chart.title, "svg": chart_svg(chart), "legend": legend(chart), "note": " ".join(notes)}


def _sample(sample: Sample) -> dict[str, Any]:
    return {
        "prompt": sample.prompt,
        "answers": [
            ("expected", sample.expected, ""),
            (
                "before: the base",
                sample.base.text,
                _ending(sample.expected, sample.base.text, sample.base.finish_reason),
            ),
            (
                "after: the adapter",
                sample.adapter.text,
                _ending(sample.expected, sample.adapter.text, sample.adapter.finish_reason),
            ),
        ],
    }


def _ending(expected: str, answer: str, finish_reason: str) -> str:
    same = "as expected, " if answer.strip() == expected.strip() else ""
    return same + ENDINGS[finish_reason]


def _data_table(data: dict[str, SplitData]) -> dict[str, Any]:
    """The splits' names, and rows of (label, a text for each split)."""
    splits = list(data.values())
    rows = [
        (name.replace("_", " "), [f"{getattr(split, name):,}" for split in splits])
        for name in (
            "rows",
            "kept",
            "dropped",
            "truncated",
            "duplicates",
            "leaked",
            "total_tokens",
            "supervised_tokens",
        )
    ]
    rows.append(("supervised share", [_share(split.supervised_tokens, split.total_tokens) for split in splits]))
    for label, name in (("median length", "median"), ("95 % at most", "p95"), ("longest", "longest")):
        rows.append((label, ["" if split.lengths is None else f"{getattr(split.lengths, name):,}" for split in splits]))
    return {"splits": list(data), "rows": rows}


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""


def _facts(run: Run) -> list[tuple[str, str]]:
    record, contract = run.record, run.contract
    base = contract.base.id if contract.base.revision is None else f"{contract.base.id} at {contract.base.revision}"
    quantization = contract.quantization
    kind = f" ({quantization['bnb_4bit_quant_type']})" if "bnb_4bit_quant_type" in quantization else ""
    bits = f"4 bits{kind}" if quantization["load_in_4bit"] else "16 bits"
    return [
        ("base", base),
        ("base loaded in", bits),
        ("device", record.device),
        ("trained parameters", f"{record.trainable_parameters:,}"),
        ("system prompt", contract.system_prompt or "none"),
        ("versions", ", ".join(f"{name} {version}" for name, version in contract.versions.items())),
        ("kit", f"QLoRA Kit {contract.kit_version}"),
    ]
