"""Write the five shipped data sets into `datasets/<task>/`, in five formats between them; the same bytes each time.

python scripts/build_datasets.py [--out datasets]
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from scripts.tiny_corpus import facts, french, functions, reviews, stories  # noqa: E402
from scripts.tiny_corpus.holdout import PARTS, Part, Row  # noqa: E402

SEED = 11
HELD_OUT_ROWS = 300


@dataclass(frozen=True)
class Dataset:
    """How one task's rows are made and written."""

    rows: Callable[[Part, int, int], list[Row]]
    train_rows: int
    suffix: str
    write: Callable[[list[Row], Path], None]


def _write_jsonl(records: list[dict[str, object]], path: Path) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def write_messages(rows: list[Row], path: Path) -> None:
    """OpenAI messages, JSON lines."""
    records: list[dict[str, object]] = [
        {
            "messages": [
                {"role": "user", "content": row.fields["opening"]},
                {"role": "assistant", "content": row.fields["story"]},
            ]
        }
        for row in rows
    ]
    _write_jsonl(records, path)


def write_alpaca(rows: list[Row], path: Path) -> None:
    """Alpaca's columns, JSON lines."""
    records: list[dict[str, object]] = [
        {"instruction": row.fields["question"], "input": row.fields["context"], "output": row.fields["answer"]}
        for row in rows
    ]
    _write_jsonl(records, path)


def write_sharegpt(rows: list[Row], path: Path) -> None:
    """ShareGPT's conversations, one JSON list, a row a line."""
    lines = [
        json.dumps(
            {
                "conversations": [
                    {"from": "human", "value": row.fields["english"]},
                    {"from": "gpt", "value": row.fields["french"]},
                ]
            },
            ensure_ascii=False,
        )
        for row in rows
    ]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def write_columns(rows: list[Row], path: Path) -> None:
    """The task's own columns, CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=["text", "label"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.fields for row in rows)


def write_prompt_completion(rows: list[Row], path: Path) -> None:
    """Prompt and completion with the assertions beside them, Parquet."""
    table = pa.table(
        {
            "prompt": [row.fields["instruction"] for row in rows],
            "completion": [row.fields["code"] for row in rows],
            "tests": [row.fields["tests"] for row in rows],
        }
    )
    pq.write_table(table, path, compression="zstd")


DATASETS: dict[str, Dataset] = {
    "text_generation": Dataset(stories.rows, 3_000, "jsonl", write_messages),
    "question_answering": Dataset(facts.rows, 6_000, "jsonl", write_alpaca),
    "translation": Dataset(french.rows, 8_000, "json", write_sharegpt),
    "sentiment": Dataset(reviews.rows, 8_000, "csv", write_columns),
    "code_generation": Dataset(functions.rows, 6_000, "parquet", write_prompt_completion),
}


def split_rows(task: str, part: Part) -> list[Row]:
    """The rows of one shipped split, in the order of the file."""
    dataset = DATASETS[task]
    return dataset.rows(part, dataset.train_rows if part == "train" else HELD_OUT_ROWS, SEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "datasets")
    arguments = parser.parse_args()
    for task, dataset in DATASETS.items():
        folder = arguments.out / task
        folder.mkdir(parents=True, exist_ok=True)
        for part in PARTS:
            rows = split_rows(task, part)
            path = folder / f"{part}.{dataset.suffix}"
            dataset.write(rows, path)
            print(f"{path.relative_to(arguments.out.parent)}: {len(rows):,} rows, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
