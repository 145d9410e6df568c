"""What writing and checking GGUF files report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qlora_kit.errors import GuardError
from qlora_kit.merging.results import LogitDifference


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file that was written in this process, as it was when it was finished.

    Attributes:
        path: The file.
        kind: ``model`` or ``lora``.
        quant: How its matrices are quantized.
        architecture: llama.cpp's name of the architecture.
        bytes: Its size.
        tensors: How many tensors it holds.
        types: How many of them in each GGML type.
        bits_per_weight: Of its tensors.
        context_length: Positions over which llama.cpp computes as transformers does; None for an adapter.
        stop_token_ids: Where answers end, the template's stop token first; empty for an adapter.
        stamp: Device, inode, size and time of its last change, by which the file is known again.
    """

    path: Path
    kind: str
    quant: str
    architecture: str
    bytes: int
    tensors: int
    types: Mapping[str, int]
    bits_per_weight: float
    context_length: int | None
    stop_token_ids: tuple[int, ...]
    stamp: tuple[int, int, int, int] = field(repr=False)

    def require_unchanged(self) -> None:
        """Refuse a file that is no longer the one that was written.

        Raises:
            GuardError: Another file took its place, or it was changed.
        """
        if file_stamp(self.path) != self.stamp:
            raise GuardError(
                f"{self.path}: is not the file that was written a moment ago",
                expected="the file at rest: llama.cpp opens nothing but what this process wrote",
                fix="export again, with nothing else writing to the folder",
            )

    def to_json(self) -> dict[str, Any]:
        """Facts for a report."""
        content = asdict(self)
        content.pop("stamp")
        return {**content, "path": self.path.name, "stop_token_ids": list(self.stop_token_ids)}


@dataclass(frozen=True)
class GgufCheck:
    """How llama.cpp and transformers agree on a written file.

    Attributes:
        passed: Whether everything holds that ``check_gguf`` asks for.
        prompts: How many conversations and texts were tokenised.
        same_template: Whether the file's template renders each conversation as the model's does.
        same_token_ids: Whether llama.cpp's token ids are the tokenizer's for each.
        same_stop_tokens: Whether llama.cpp stops at each of the model's stop tokens.
        further_stop_ids: Where llama.cpp stops besides: tokens that it knows by their text.
        answer_agreement: Share of the tokens of llama.cpp's greedy answers that transformers would have chosen, given
            the same tokens before them.
        logits: llama.cpp on the file against transformers on the model: what a user will see.
        weights: transformers on the file's weights against transformers on the model: what the format loses.
        arithmetic: llama.cpp on the file against transformers on the file's weights: how llama.cpp computes with them.
        bound: What was asked of the logits, in words.
        problems: What does not hold, in words.
    """

    passed: bool
    prompts: int
    same_template: bool
    same_token_ids: bool
    same_stop_tokens: bool
    further_stop_ids: tuple[int, ...]
    answer_agreement: float
    logits: LogitDifference
    weights: LogitDifference
    arithmetic: LogitDifference
    bound: str
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The object ``verification`` of a report; its first keys are those of a merge's."""
        parts = asdict(self)
        logits = parts.pop("logits")
        return {
            "checked": True,
            "passed": parts.pop("passed"),
            "max_abs_logit_diff": logits["max_abs"],
            "mean_abs_logit_diff": logits["mean_abs"],
            "top1_agreement": logits["top1_agreement"],
            "kl": logits["kl"],
            "positions": logits["positions"],
            **parts,
            "further_stop_ids": list(self.further_stop_ids),
            "problems": list(self.problems),
        }


def file_stamp(path: Path) -> tuple[int, int, int, int] | None:
    """Device, inode, size and time of the last change; None where there is no such file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
