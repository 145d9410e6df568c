"""What a merge reports: numbers in, the JSON of the command line, of ``merge_report.json`` and of the card out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
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
class Verification:
    """What was measured on the written files.

    Attributes:
        passed: Whether the gate holds: no tensor is wrong, and the logits stay within the limits.
        tensors: The tensors, against a second evaluation from base and adapter.
        logits: The written model against the base it was merged onto + the adapter, both in fp32.
        noise: What one rounding of the merged weights does to the logits, measured in the same run.
        effect: The base it was merged onto without the adapter against with it: what the merge is for.
        max_limit: What ``logits.max_abs`` may be.
        mean_limit: What ``logits.mean_abs`` may be.
        drift: The written model against the base as trained + the adapter; None where the contract is missing.
    """

    passed: bool
    tensors: TensorCheck
    logits: LogitDifference
    noise: LogitDifference
    effect: LogitDifference
    max_limit: float
    mean_limit: float
    drift: LogitDifference | None

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
            "adapter_effect": asdict(self.effect),
            "tensors": {**asdict(self.tensors), "violations": list(self.tensors.violations)},
            "drift": None if self.drift is None else asdict(self.drift),
        }


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


@dataclass(frozen=True)
class MergeResult:
    """A finished merge.

    Attributes:
        output_dir: The folder that was written.
        adapter: Name of the adapter.
        base: Id of the base, with its revision.
        revision: Of a Hub id.
        onto: ``dequantized`` or ``original``.
        choice: How ``auto`` chose it; None where it was given.
        base_match: What shows that the base is the one of training: its ``fingerprint``, or the ``nf4_codes`` that it
            quantizes to (the 16-bit model of a base that was quantized already); None without a contract.
        seconds: Wall time of all of it.
        peak_rss_bytes: The most memory that the process held so far, mapped files counted.
        weight_bytes: Size of the written tensors.
        adapted_weights: How many numbers the adapter targets.
        changed_weights: How many of them differ from the base used, after the rounding.
        verification: None if it was switched off.
    """

    output_dir: Path
    adapter: str
    base: str
    revision: str | None
    onto: str
    choice: OntoChoice | None
    base_match: str | None
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
