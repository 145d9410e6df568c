"""``metrics.json``: everything about a finished run that its report is made of."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from qlora_kit.data.ledger import SPLITS, Ledger
from qlora_kit.data.lengths import summarise
from qlora_kit.report import RECORD_FILE, Sample, SplitData


def write_record(
    folder: Path,
    *,
    metrics: Mapping[str, Any],
    device: torch.device,
    ledger: Ledger,
    samples: Iterable[Sample],
    history: Iterable[Mapping[str, Any]],
) -> None:
    """Write the record into ``folder``.

    Args:
        folder: The run folder, or one that becomes it.
        metrics: The figures of ``TrainResult``.
        device: Where the model was trained.
        ledger: Its counts and lengths go into the record.
        samples: Answers before and after training.
        history: The trainer's log lines, oldest first.
    """
    record = {
        **metrics,
        "device": _device_name(device),
        "data": {split: data.model_dump(mode="json") for split, data in _splits(ledger).items()},
        "samples": [sample.model_dump(mode="json") for sample in samples],
        "history": [_plain_json(entry) for entry in history],
    }
    text = json.dumps(record, indent=2, allow_nan=False, ensure_ascii=False)
    (folder / RECORD_FILE).write_text(text + "\n", encoding="utf-8")


def _splits(ledger: Ledger) -> dict[str, SplitData]:
    return {
        split: SplitData(**ledger.report(split).to_json(), lengths=summarise(ledger.lengths[split]))
        for split in SPLITS
        if ledger.rows[split]
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def _plain_json(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A log line without NaN and infinity (a gradient norm where fp16 overflowed), which JSON does not have."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in entry.items()
    }
