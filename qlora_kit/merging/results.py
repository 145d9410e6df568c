"""What a merge reports: numbers in, the JSON of the command line, of ``merge_report.json`` and of the card out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class LogitDifference:
    """How far apart two models' logits are, over every position of the probe conversations.

    Attributes:
        max_abs: Largest absolute difference of a logit.
        mean_abs: Mean absolute difference.
        top1_agreement: Share of positions whose likeliest token is the same, 0 to 1.
        kl: Mean Kullback-Leibler divergence from the reference's distribution, in nats.
        positions: How many positions were compared.
    """

    max_abs: float
    mean_abs: float
    top1_agreement: float
    kl: float
    positions: int


@dataclass(frozen=True)
class TensorCheck:
    """What the written tensors were found to be; each of the base's tensors is counted once.

    Attributes:
        merged: Weights that the adapter targets.
        round_trips: Other weights that must equal their own 4-bit round trip.
        trained_rows: Embedding and head where the adapter brings rows; the other rows must equal the base's.
        replaced: Tensors that must equal the adapter's own (``modules_to_save``, ``bias``), rounded once.
        copied: Tensors that must equal the base's, byte by byte.
        violations: What does not hold, one text for each tensor.
    """

    merged: int
    round_trips: int
    trained_rows: int
    replaced: int
    copied: int
    violations: tuple[str, ...]


@dataclass(frozen=True)
class RowsCheck:
    """What was measured on validation rows, at the positions that predict their answers; losses in nats a token.

    Attributes:
        rows: How many rows.
        logits: The written model against the base it was merged onto + the adapter.
        noise: What one rounding does there.
        drift: The written model against the base as trained + the adapter; None where the contract is missing.
        loss: Of the written model.
        expected_loss: Of the base it was merged onto + the adapter.
        trained_loss: Of the base as trained + the adapter; None where the contract is missing.
    """

    rows: int
    logits: LogitDifference
    noise: LogitDifference
    drift: LogitDifference | None
    loss: float
    expected_loss: float
    trained_loss: float | None


@dataclass(frozen=True)
class MetricCheck:
    """The task's metric of generated answers: the merged model beside the live adapter.

    Attributes:
        reason: Why it was not checked; empty where it was.
        task: The task.
        metric: Its first metric, or ``stop_rate`` where that one runs code.
        rows: How many prompts were answered.
        merged: The merged model's score.
        live: The live adapter's.
        merged_stop_rate: Share of the merged model's answers that ended by themselves.
        live_stop_rate: The same of the live adapter.
        same_answers: Share of prompts to which both gave the same text.
    """

    reason: str
    task: str | None = None
    metric: str | None = None
    rows: int = 0
    merged: float | None = None
    live: float | None = None
    merged_stop_rate: float | None = None
    live_stop_rate: float | None = None
    same_answers: float | None = None


@dataclass(frozen=True)
class Verification:
    """What was measured on the written files.

    Attributes:
        passed: Whether the gate holds: no tensor is wrong, and the logits stay within the limits.
        tensors: The tensors, against a second evaluation from base and adapter.
        logits: The written model against the base it was merged onto + the adapter, both in fp32.
        noise: What one rounding of the merged weights does to the logits, measured in the same run.
        effect: The base it was merged onto without the adapter against with it: what the merge is for. Of a trained
            base, the base's own weights against it: what 4 bits cost; None where its files hold 4-bit weights.
        max_limit: What ``logits.max_abs`` may be.
        mean_limit: What ``logits.mean_abs`` may be.
        drift: The written model against the base as trained + the adapter; None where the contract is missing.
        on_rows: The same on the adapter's validation rows; else why they were not measured.
        answers: The task's metric of generated answers.
    """

    passed: bool
    tensors: TensorCheck
    logits: LogitDifference
    noise: LogitDifference
    effect: LogitDifference | None
    max_limit: float
    mean_limit: float
    drift: LogitDifference | None
    on_rows: RowsCheck | str
    answers: MetricCheck

    def to_json(self) -> dict[str, Any]:
        """The keys that other programs rely on, then the rest."""
        return {
            "passed": self.passed,
            "max_abs_logit_diff": self.logits.max_abs,
            "mean_abs_logit_diff": self.logits.mean_abs,
            "top1_agreement": self.logits.top1_agreement,
            "kl": self.logits.kl,
            "positions": self.logits.positions,
            "max_abs_limit": self.max_limit,
            "mean_abs_limit": self.mean_limit,
            "rounding_noise": asdict(self.noise),
            "effect": None if self.effect is None else asdict(self.effect),
            "tensors": {**asdict(self.tensors), "violations": list(self.tensors.violations)},
            "drift": None if self.drift is None else asdict(self.drift),
            "validation_rows": self.on_rows if isinstance(self.on_rows, str) else asdict(self.on_rows),
            "generated_metric": f"not checked: {self.answers.reason}" if self.answers.reason else asdict(self.answers),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Verification:
        """What ``to_json`` gave.

        Raises:
            KeyError: A key is missing.
            TypeError: A part has other keys.
        """
        rows, answers = content["validation_rows"], content["generated_metric"]
        tensors = content["tensors"]
        return cls(
            passed=content["passed"],
            tensors=TensorCheck(**{**tensors, "violations": tuple(tensors["violations"])}),
            logits=LogitDifference(
                max_abs=content["max_abs_logit_diff"],
                mean_abs=content["mean_abs_logit_diff"],
                top1_agreement=content["top1_agreement"],
                kl=content["kl"],
                positions=content["positions"],
            ),
            noise=LogitDifference(**content["rounding_noise"]),
            effect=_difference(content["effect"]),
            max_limit=content["max_abs_limit"],
            mean_limit=content["mean_abs_limit"],
            drift=_difference(content["drift"]),
            on_rows=rows if isinstance(rows, str) else _rows_check(rows),
            answers=MetricCheck(answers.removeprefix("not checked: "))
            if isinstance(answers, str)
            else MetricCheck(**answers),
        )


def _difference(content: Mapping[str, Any] | None) -> LogitDifference | None:
    return None if content is None else LogitDifference(**content)


def _rows_check(content: Mapping[str, Any]) -> RowsCheck:
    return RowsCheck(
        **{
            **content,
            "logits": LogitDifference(**content["logits"]),
            "noise": LogitDifference(**content["noise"]),
            "drift": _difference(content["drift"]),
        }
    )


@dataclass(frozen=True)
class Candidate:
    """What one way of merging costs.

    Attributes:
        loss: Of the merged model on the validation rows, in nats a supervised token.
        against_live: Its logits there against those of the base as trained + the adapter.
    """

    loss: float
    against_live: LogitDifference


@dataclass(frozen=True)
class OntoChoice:
    """How ``auto`` chose what to merge onto.

    Attributes:
        reason: Why the chosen way was taken.
        rows: How many validation rows were measured; 0 where none were.
        tokens: How many supervised tokens they have.
        live_loss: The loss of the base as trained + the adapter on them.
        candidates: What each way costs, by its name.
        difference: Loss onto original minus loss onto dequantized.
        difference_ci95: Its 95 % interval, by resampling rows.
    """

    reason: str
    rows: int
    tokens: int
    live_loss: float | None
    candidates: Mapping[str, Candidate]
    difference: float | None
    difference_ci95: tuple[float, float] | None

    @classmethod
    def unmeasured(cls, reason: str) -> OntoChoice:
        """A choice that no rows were measured for."""
        return cls(reason, rows=0, tokens=0, live_loss=None, candidates={}, difference=None, difference_ci95=None)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> OntoChoice:
        """What ``asdict`` gave.

        Raises:
            TypeError: Other keys.
        """
        candidates = {
            name: Candidate(cost["loss"], LogitDifference(**cost["against_live"]))
            for name, cost in content["candidates"].items()
        }
        interval = content["difference_ci95"]
        interval = None if interval is None else (interval[0], interval[1])
        return cls(**{**content, "candidates": candidates, "difference_ci95": interval})


@dataclass(frozen=True)
class MergeResult:
    """A finished merge.

    Attributes:
        output_dir: The folder that was written.
        kind: ``merge``, or ``trained_base`` where no adapter was merged.
        adapter: Name of the adapter; None for a trained base.
        base: Id of the base, with its revision.
        revision: Of a Hub id.
        onto: ``dequantized`` or ``original``.
        choice: How ``auto`` chose it; None where it was given.
        base_match: What shows that the base is the one of training: its ``fingerprint``, or the ``nf4_codes`` that it
            quantizes to (the 16-bit model of a base that was quantized already); None without a contract.
        already_there: Whether the folder held the result of the same inputs, and nothing had to be done.
        seconds: Wall time of all of it.
        peak_rss_bytes: The most memory that the process held so far, mapped files counted.
        weight_bytes: Size of the written tensors.
        adapted_weights: How many numbers the adapter targets.
        changed_weights: How many of them differ from the base used, after the rounding.
        verification: None if it was switched off.
    """

    output_dir: Path
    kind: str
    adapter: str | None
    base: str
    revision: str | None
    onto: str
    choice: OntoChoice | None
    base_match: str | None
    already_there: bool
    seconds: float
    peak_rss_bytes: int
    weight_bytes: int
    adapted_weights: int
    changed_weights: int
    verification: Verification | None

    def to_json(self) -> dict[str, Any]:
        """The JSON object of the command."""
        content = {**asdict(self), "output_dir": str(self.output_dir)}
        content["verification"] = None if self.verification is None else self.verification.to_json()
        return content

    @classmethod
    def from_report(cls, content: Mapping[str, Any], output_dir: Path) -> MergeResult:
        """The result that a report holds, as one that was there already.

        Raises:
            KeyError: A key is missing.
            TypeError: A part has other keys.
        """
        own = [item.name for item in fields(cls) if item.name not in ("output_dir", "already_there")]
        values = {name: content[name] for name in own}
        choice, verification = values["choice"], values["verification"]
        values["choice"] = None if choice is None else OntoChoice.from_json(choice)
        values["verification"] = None if verification is None else Verification.from_json(verification)
        return cls(**values, output_dir=output_dir, already_there=True)
